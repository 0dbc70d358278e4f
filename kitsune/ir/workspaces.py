"""cuBLAS's workspaces, of which torch keeps one for each thread and stream, and to which graphs refer by address.

A graph is to have those that are taken during its capture, in its own memory: one from before could be in use on another stream
when the graph runs, or be gone by then, and one from inside must not be found by others. So all are let go of before and behind
each capture. The program's own are no exception: 12 of 18 trainings with graphed modules ended with a launch failure (H200). But
graphs from before Kitsune may have the addresses of those that are there. Beside such, a graph has one from before, of a stream
of Kitsune's own: from inside it would stay behind the graph, and with it the block that it was cut from (746 MiB of a training
of which the next graph took 800).
"""

from functools import cache

import torch


def let_go() -> None:
    """Have torch take new ones from here on, unless a graph may use those that it has."""
    if torch.cuda.is_initialized() and not _are_of_others():  # type: ignore[no-untyped-call]
        torch._C._cuda_clearCublasWorkspaces()


def keep_outside() -> None:
    """To be called before a capture of Kitsune's, on each stream of it that computes products."""
    if torch.cuda.is_initialized() and _are_of_others():  # type: ignore[no-untyped-call]
        torch.cuda.current_blas_handle()  # type: ignore[no-untyped-call]


@cache
def _are_of_others() -> bool:
    """Had anybody captured before the first capture that Kitsune makes or hears of? A graph's memory is in a pool of its own."""
    try:
        segments = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
    except RuntimeError:
        # Of the driver's own allocator, or one of the program's, nobody can tell; and what was taken inside of a capture must not
        # be found by others.
        return False
    return any(tuple(segment["segment_pool_id"]) != (0, 0) for segment in segments)
