"""How long a device takes for something, without the time that the host takes to ask for it."""

import itertools
import time
from collections.abc import Callable

import torch

# Runs that are timed at once, and how often; the best counts, being the least disturbed.
RUNS, TIMES = 10, 3
# The device is kept busy for so long, that the host can ask for all runs meanwhile: 200 calls of a library at 16 us.
HEAD_START_CYCLES = 6_000_000


def device_seconds(run: Callable[[], None], device: torch.device) -> float:
    """Seconds of one run. Waits for the device."""
    run()
    return min((_on_cuda if device.type == "cuda" else _on_the_host)(run) for _ in range(TIMES)) / RUNS


def _on_cuda(run: Callable[[], None]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HEAD_START_CYCLES)
    start.record()
    for _ in range(RUNS):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _on_the_host(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    for _ in range(RUNS):
        run()
    return time.perf_counter() - start


# The host takes 16 us to start a kernel and 5 to record an event, at up to 2 GHz of the device.
CYCLES_PER_START = 50_000


def in_turn(runs: list[Callable[[], None]]) -> Callable[[], list[float] | None]:
    """Put each on the current stream, once, and wait for nothing. Returns what tells the seconds that each took the device, and
    None as long as the device is not through."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(runs) + 1)]
    torch.cuda._sleep(CYCLES_PER_START * len(runs))
    marks[0].record()
    for run, mark in zip(runs, marks[1:], strict=True):
        run()
        mark.record()

    def seconds() -> list[float] | None:
        if not marks[-1].query():
            return None
        return [start.elapsed_time(end) / 1e3 for start, end in itertools.pairwise(marks)]

    return seconds
