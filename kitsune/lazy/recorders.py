"""The recorders that there are, in all threads."""

import threading
import weakref
from typing import Any

from kitsune.ir import in_own_thread

# Those with an open context; and all.
OPEN: list[Any] = []
EVERY: "weakref.WeakSet[Any]" = weakref.WeakSet()
# One for all of them. A recorder reads tensors of others, for which it must wait in the middle of an op: while each had its own,
# two threads that read of each other waited for ever.
lock = threading.RLock()


def renew_lock() -> None:
    """A new lock for all: in a forked child, the old one may be held by a thread that is not there."""
    global lock
    lock = threading.RLock()
    for recorder in list(EVERY):
        recorder.use_lock(lock)


def in_a_step() -> bool:
    """Is something being recorded or run now? Other threads ask: the answer may be a moment old."""
    return any(recorder.running or recorder.region.node.depth for recorder in list(OPEN))


def where_in_step() -> tuple[Any, ...] | None:
    """How far the recording of steps has come: the same twice while an operator takes its time. None where one is run at length,
    of which nothing tells how far that is."""
    recorders = list(OPEN)
    return None if any(recorder.running for recorder in recorders) else tuple(id(one.region.node) for one in recorders)


def listening() -> list[Any]:
    """Those that are to hear of what the calling thread does."""
    return [] if in_own_thread() else OPEN


def of_this_thread() -> list[Any]:
    """Those that take what the calling thread does."""
    return [recorder for recorder in listening() if is_of_this_thread(recorder)]


def is_of_this_thread(recorder: Any) -> bool:
    """Was it made for the calling thread?"""
    return recorder.lane is not None and bool(recorder.lane.thread == threading.get_ident())
