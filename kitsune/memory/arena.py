"""Where each storage lies in the arena: two share bytes only if every use of the one happens before the other is made."""

from collections.abc import Sequence

from kitsune.ir import bits
from kitsune.memory.lifetimes import Lifetime

# What the allocator of CUDA memory aligns to; vector loads need 16.
ALIGNMENT = 512


def assign_offsets(lives: Sequence[Lifetime], before: Sequence[int]) -> tuple[dict[int, int], int]:
    """The first byte of each storage that lies in the arena, and the arena's size.

    `before[k]` has the launches that have ended when launch k starts, as bits. The arena is as large as what it holds at the
    moment when most memory is in use, counting also what is made elsewhere: so it never adds to the peak. What is alive then is
    stacked; the rest, largest first, goes where it fits, and what fits nowhere is left to memory of its own.
    """
    ours = [life for life in lives if life.in_arena and life.nbytes]
    conflicts = _conflicts(ours, before)
    worst = _worst_moment(lives)
    at_worst = [life.first <= worst < life.uses.bit_length() for life in ours]
    arena = sum(_rounded(life.nbytes) for life, then in zip(ours, at_worst, strict=True) if then)
    order = sorted(range(len(ours)), key=lambda k: (not at_worst[k], -ours[k].nbytes, ours[k].first))
    offsets: dict[int, int] = {}
    placed: dict[int, tuple[int, int]] = {}
    mask = 0
    for k in order:
        size = _rounded(ours[k].nbytes)
        taken = sorted(placed[other] for other in bits(conflicts[k] & mask))
        offset = _lowest_gap(taken, size)
        if offset + size <= arena:
            placed[k] = (offset, offset + size)
            mask |= 1 << k
            offsets[ours[k].storage] = offset
    return offsets, arena


def _rounded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _worst_moment(lives: Sequence[Lifetime]) -> int:
    """The launch during which most bytes are in use."""
    change: dict[int, int] = {}
    for life in lives:
        change[life.first] = change.get(life.first, 0) + life.nbytes
        end = life.uses.bit_length()
        change[end] = change.get(end, 0) - life.nbytes
    in_use = most = worst = 0
    for k in sorted(change):
        in_use += change[k]
        if in_use > most:
            most, worst = in_use, k
    return worst


def _conflicts(lives: Sequence[Lifetime], before: Sequence[int]) -> list[int]:
    """For each storage those that may be in use at the same time, as bits."""
    ended = _ended_for_good(before)
    found = [0] * len(lives)
    active: list[int] = []
    for k in sorted(range(len(lives)), key=lambda k: lives[k].first):
        first = lives[k].first
        active = [other for other in active if lives[other].uses & ~ended[first]]
        for other in active:
            if lives[other].uses & ~before[first]:
                found[k] |= 1 << other
                found[other] |= 1 << k
        active.append(k)
    return found


def _ended_for_good(before: Sequence[int]) -> list[int]:
    """For each launch the launches that have ended before it and before every later one, whatever their streams."""
    found, common = [], -1
    for mask in reversed(before):
        common &= mask
        found.append(common)
    return found[::-1]


def _lowest_gap(blocks: Sequence[tuple[int, int]], size: int) -> int:
    """The first offset with room between blocks, which are sorted and may overlap."""
    end = 0
    for start, stop in blocks:
        if start - end >= size:
            return end
        end = max(end, stop)
    return end
