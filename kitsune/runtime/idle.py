"""Memory that torch's allocator keeps for later requests: what neither a graph nor an arena can use goes back to the device.

A graph takes its memory from a pool of its own, and an arena is one block. Neither finds room in what eager's steps have left,
which would be held beside them from then on.
"""

from typing import Any

import torch

# Less than that is not worth waiting for the device.
WORTH_GIVING_BACK = 32 << 20


def give_back(device: torch.device) -> None:
    """Let go of what is cached for nobody, where it is much. The device has to come to an end of its work for that."""
    if device.type == "cuda" and idle_bytes(device) >= WORTH_GIVING_BACK:
        torch.cuda.empty_cache()


def would_rise(device: torch.device, ours: int) -> bool:
    """Would the most that was ever held rise, if as much were asked for as ever was? Of what is lent now, `ours` is of no use for
    that."""
    if device.type != "cuda":
        return False
    statistics = _statistics(device)
    if not statistics:
        return False
    reserved, allocated = (statistics[name]["all"] for name in ("reserved_bytes", "allocated_bytes"))
    lacking = allocated["peak"] - (allocated["current"] - ours)
    return bool(reserved["current"] + lacking >= reserved["peak"] + WORTH_GIVING_BACK)


def was_lent(device: torch.device, nbytes: int) -> bool:
    """Were so many bytes more than now lent at once before? Then the most that ever were does not rise by them."""
    statistics = _statistics(device) if device.type == "cuda" else {}
    if not statistics:
        return True
    allocated = statistics["allocated_bytes"]["all"]
    return bool(allocated["current"] + nbytes <= allocated["peak"])


def idle_bytes(device: torch.device) -> int:
    """Bytes that the allocator holds and has lent to nobody, those of graphs between their replays among them."""
    statistics = _statistics(device)
    if not statistics:
        return 0
    reserved, allocated = (statistics[name]["all"]["current"] for name in ("reserved_bytes", "allocated_bytes"))
    return int(reserved - allocated)


def reserved_bytes(device: torch.device) -> int:
    """Bytes that the allocator holds. (torch's own function for that first puts all that it knows into one list, in order.)"""
    statistics = _statistics(device)
    return int(statistics["reserved_bytes"]["all"]["current"]) if statistics else 0


def has_room(device: torch.device) -> bool:
    """Would an eager step fit into the device's memory beside what is kept for recorded ones?"""
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    statistics = _statistics(device)
    return not statistics or bool(free >= statistics["allocated_bytes"]["all"]["peak"])


def asked_bytes(device: torch.device) -> int:
    """Bytes that were ever asked of the device's allocator."""
    if device.type != "cuda":
        return 0
    statistics = _statistics(device)
    return int(statistics["allocated_bytes"]["all"]["allocated"]) if statistics else 0


def _statistics(device: torch.device) -> dict[str, Any]:
    """What the allocator counts; nothing before it was first asked, nor where the program has put another in torch's place, which
    counts nothing."""
    try:
        return torch.cuda.memory_stats_as_nested_dict(device)
    except RuntimeError:
        return {}
