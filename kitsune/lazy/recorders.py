"""The recorders that there are, in all threads."""

import weakref
from typing import Any

from kitsune.ir import in_own_thread

# Those with an open context; and all.
OPEN: list[Any] = []
EVERY: "weakref.WeakSet[Any]" = weakref.WeakSet()


def in_a_step() -> bool:
    """Is something being recorded or run now? Other threads ask: the answer may be a moment old."""
    return any(recorder.running or recorder.region.node.depth for recorder in list(OPEN))


def listening() -> list[Any]:
    """Those that are to hear of what the calling thread does."""
    return [] if in_own_thread() else OPEN
