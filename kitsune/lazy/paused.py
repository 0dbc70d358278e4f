"""Recorders that let everything pass for a while."""

from typing import Any

from kitsune.ir import Barrier


class Paused:
    """Those recorders. After an interrupt at any line of it, `end` may be called again; and once it has ended, too."""

    def __init__(self, recorders: list[Any], cause: Barrier) -> None:
        # How often each was paused before; once they resume, how often it is to be.
        self._before = [(recorder, recorder.paused) for recorder in recorders]
        self._after: list[tuple[Any, int]] | None = None
        self._has_begun, self._cause = False, cause

    def begin(self) -> None:
        """Run what is pending, and let pass what comes."""
        for recorder, _ in self._before:
            recorder.flush(self._cause)
        for recorder, _ in self._before:
            recorder.pause()
        self._has_begun = True

    def end(self) -> None:
        """Record again, unless somebody else has paused them, too."""
        if self._after is None:
            now = [(recorder, recorder.paused - 1) for recorder, _ in self._before]
            self._after = now if self._has_begun else self._before
        for recorder, n in self._after:
            recorder.resume(n)
        self._after = []
