"""What the program took of a view, detached, before that had its place in the autograd graph.

Until a call that was followed is made again, a view has a count of writes of its own, which what is detached from it shares.
Then autograd gives the view the count of its base, and torch has no way to let the others have it, too: what they count from
then on is counted once more.
"""

import weakref
from typing import Any

import torch

_detached = torch._C.TensorBase.detach
_version = torch._C.TensorBase._version.__get__  # type: ignore[attr-defined]


class _Mark:
    """Lives as long as the node of the graph that has it."""


class Twin:
    """Two counts that eager has as one: a view's, and that of what its wrapper was before."""

    __slots__ = ("_before", "_mark", "_now", "_seen")

    def __init__(self, now: Any, before: Any) -> None:
        # Shared counts without the wrappers, which would keep memory; the first is that of what autograd has saved, too.
        with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
            self._now, self._before = _detached(now), _detached(before)
            # Views of one call have one node.
            mark = now.grad_fn.metadata.setdefault(_Mark, _Mark())
        self._mark = weakref.ref(mark)
        self.look()

    def look(self) -> None:
        """Take what has been counted so far as known."""
        self._seen = _version(self._now), _version(self._before)

    def matters(self) -> bool:
        """Is the graph there in which a backward could look at the count?"""
        return self._mark() is not None

    def follow(self) -> None:
        """Count for each what was written to the other since."""
        versions = _version(self._now), _version(self._before)
        here, there = (version - seen for version, seen in zip(versions, self._seen, strict=True))
        both = tuple(seen + here + there for seen in self._seen)
        torch._C._autograd._unsafe_set_version_counter((self._now, self._before), both)
        self.look()


def settle(twins: list[Twin]) -> None:
    """Count the writes that have come, and let go of the twins whose graph is gone."""
    twins[:] = [twin for twin in twins if twin.matters()]
    # Views of one base share a count, and of the later ones' writes the earlier ones hear the second time.
    for twin in (*twins, *twins):
        twin.follow()
