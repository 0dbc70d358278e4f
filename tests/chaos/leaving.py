"""An interrupt at each line of leaving a context, of entering `disable()` and of leaving it: nothing is left half done.

    python -m tests.chaos.leaving leaving | disabling | enabling [first | last] [5]

Each line (or every fifth) is interrupted the first or the last time that it is run, in a fork of a process in which training goes
on. It prints how many lines there were, and in which something was left. Not interrupted is the first line of an `__exit__`:
there nothing has begun, and Python does not call it again.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from typing import Any

import torch

import kitsune
from tests.chaos.counting import Loop, lazily
from tests.chaos.first_entering import COMING, Line, apart, lines_of, settings, train, trained
from tests.chaos.test_interrupts import leaves_nothing


class Scene:
    """A training in a context, with something pending, and what is to be interrupted."""

    def __init__(self, what: str) -> None:
        self.what, self.loop, self.before = what, Loop(), settings()
        self.context, self.disabled = lazily(), kitsune.disable()
        self.context.__enter__()
        train(self.loop)
        if what == "enabling":
            self.disabled.__enter__()
        self.pending = torch.ones(3) * 2 + 1

    def act(self, told: Callable[[Line, int], None]) -> None:
        """What is interrupted, under a trace."""
        act: Any = self.disabled.__enter__ if self.what == "disabling" else self.disabled.__exit__
        act = self.context.__exit__ if self.what == "leaving" else act
        given = () if self.what == "disabling" else (None, None, None)
        sys.settrace(lines_of(told))
        try:
            act(*given)
        finally:
            sys.settrace(None)

    def left(self) -> str | None:
        """What is as it should not be."""
        if self.what != "leaving":
            # The context is open, and records.
            if [pipeline.recorder.paused for pipeline in kitsune.contexts.here.depth] != [0]:
                return "a recorder is paused, or is none"
            self.context.__exit__(None, None, None)
        if self.pending.tolist() != [3.0] * 3:
            return "what was pending is lost"
        if found := leaves_nothing():
            return found
        if settings() != self.before:
            return f"{settings()} instead of {self.before}"
        if any(each._originals for each in COMING):
            return "doors are left"
        types = {type(p.grad) for p in self.loop.model.parameters()}
        return None if kitsune.lazy.LazyTensor not in types else f"gradients are {types}"


def places(what: str, which: str) -> dict[str, int]:
    """Its lines, and after how many others each comes the first or the last time."""
    found: dict[str, int] = {}
    scene = Scene(what)

    def told(line: Line, n: int) -> None:
        name = f"{line[0]}:{line[1]}"
        if which == "last" or name not in found:
            found[name] = n

    scene.act(told)
    # The first line of an `__exit__`.
    return {name: n for name, n in found.items() if n > 0 or what == "disabling"}


def interrupted(what: str, at: int, expected: list[torch.Tensor]) -> Any:
    """What an interrupt before a certain line leaves."""
    scene = Scene(what)

    def told(line: Line, n: int) -> None:
        if n == at:
            sys.settrace(None)
            raise KeyboardInterrupt

    try:
        scene.act(told)
        return "nothing was interrupted"
    except KeyboardInterrupt:
        pass
    return scene.left() or trained(expected)


def whole(what: str, expected: list[torch.Tensor]) -> Any:
    """The same without an interrupt."""
    scene = Scene(what)
    scene.act(lambda line, n: None)
    if what == "disabling":
        scene.disabled.__exit__(None, None, None)
    return scene.left() or trained(expected)


def main() -> int:
    torch.set_num_threads(1)
    what, which, every = (*sys.argv[1:], *("first", "1")[len(sys.argv) - 2 :])
    loop = Loop()
    train(loop)
    state = loop.state()
    # Or each fork would look at, and copy, all that torch has brought.
    gc.freeze()
    expected = apart(lambda: whole(what, state))
    found = dict(list(apart(lambda: places(what, which)).items())[:: int(every)])
    wrong = {line: got for line, n in found.items() if (got := apart(lambda n=n: interrupted(what, n, state))) != expected}
    print(json.dumps({"lines": len(found), "wrong": wrong, "expected": expected}))
    return 0


if __name__ == "__main__":
    with kitsune.config.patch(gate=False):
        sys.exit(main())
