"""Calls that are still owed when their region ends, and whose results nobody holds any more: a metric's, of which the program
keeps a count. Nobody can ask for their graph, so they need not be made again for it.
"""

from bisect import bisect_left
from typing import Any

from kitsune.lazy.realize import MADE
from kitsune.lazy.used_again import are_held


def forgive(region: Any) -> None:
    """Let go of such calls of a region that ends."""
    recorder, calls = region.recorder, region.calls
    # What writes is counted as it is made again; what casts a weight is to leave the cast with autocast.
    if region.cut is not None or recorder.watcher is not None or recorder.lane.twins or any(map(_does_more, calls)):
        return
    left = []
    # From the last on: a call holds what it was given.
    for k in reversed(range(len(calls))):
        if _holds(calls[k]):
            left.append(k)
        else:
            calls[k] = None
    left.reverse()
    region.counted = [(bisect_left(left, n), tensors) for n, tensors in region.counted] if left else []
    region.calls = [calls[k] for k in left]


def _does_more(call: tuple[Any, ...]) -> bool:
    edge = call[0]
    return bool(edge.dirty or edge.bumps or edge.casts)


def _holds(call: tuple[Any, ...]) -> bool:
    """Does anybody else hold what a call has made?"""
    made = call[MADE]
    return any(are_held(list(made), besides=1))
