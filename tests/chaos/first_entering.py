"""An interrupt at each line of the first entering of a process: nothing is left, and the next entering finds all as it should be.

    python -m tests.chaos.first_entering [first | last] [N]

Each line, or with N every Nth, is interrupted the first or the last time that it is run, in a fork of a process that has entered
no context yet. It prints how many lines there were, and in which something was left.
"""

from __future__ import annotations

import gc
import json
import linecache
import os
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch.optim.optimizer import _global_optimizer_post_hooks

import kitsune
from kitsune.contexts import _open, everyone
from kitsune.lazy import doors, graph_doors
from kitsune.lazy.door_set import DoorSet
from kitsune.lazy.recorders import OPEN
from tests.chaos.counting import Loop, lazily
from tests.chaos.test_interrupts import leaves_nothing

COMING = (doors._WATCHED, graph_doors._DOORS)
Line = tuple[str, int]


def lines_of(frames: Callable[[Line, int], None]) -> Any:
    """A trace function that tells of each line, and how many there were before it."""
    n = 0

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal n
        # Python comes to a `with` again when its block ends, to call what ends it: a signal is not heard before that has been.
        # Nor is one at a `try`, which does nothing.
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip()
        if event == "line" and not line.startswith(("with ", "try:")):
            frames((f"{frame.f_code.co_filename}:{frame.f_code.co_name}", frame.f_lineno), n)
            n += 1
        return trace

    return trace


def enter(told: Callable[[Line, int], None]) -> Any:
    """Enter a context under a trace; returns it if nothing is raised."""
    context = lazily()
    sys.settrace(lines_of(told))
    try:
        return context.__enter__()
    finally:
        sys.settrace(None)


def apart(function: Callable[[], Any]) -> Any:
    """What a function returns in a fork of this process; its death is an answer, too."""
    here, there = os.pipe()
    child = os.fork()
    if not child:
        try:
            answer = function()
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        with open(there, "w") as file:
            json.dump(answer, file)
            file.flush()
            os._exit(0)
    os.close(there)
    with open(here) as file:
        text = file.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else "the process died"


def places(which: str) -> dict[str, int]:
    """The lines of a first entering, and after how many others each comes the first or the last time."""
    found: dict[str, int] = {}

    def told(line: Line, n: int) -> None:
        name = f"{line[0]}:{line[1]}"
        if which == "last" or name not in found:
            found[name] = n

    enter(told).__exit__(None, None, None)
    return found


def train(loop: Loop) -> None:
    """The least in which something is followed."""
    for i in range(3):
        loop.step(i)


def put_on(door_set: DoorSet) -> Iterator[tuple[str, str, int]]:
    """Of each door that is on: where, and before how many others."""
    for owner, name, _, original in door_set._originals:
        depth, door = 0, vars(owner)[name]
        while door is not original and hasattr(door, "__wrapped__"):
            depth, door = depth + 1, door.__wrapped__
        yield getattr(owner, "__name__", str(owner)), name, depth


def settings() -> tuple[Any, ...]:
    """What a context changes in the process."""
    hooks = [*_global_optimizer_post_hooks.values()]
    return gc.get_threshold(), torch._C._is_view_replay_enabled(), hooks, torch.get_default_dtype(), [*OPEN], [*_open]


def trained(expected: list[torch.Tensor]) -> Any:
    """What a training is like that comes now, and which doors are there in it."""
    loop = Loop()
    with lazily():
        there = [sorted(put_on(each)) for each in (doors._LASTING, *COMING)]
        train(loop)
    same = all(torch.equal(a, b) for a, b in zip(loop.state(), expected, strict=True))
    return {"same": same, "doors": there, "followed": kitsune.counters()["backwards_followed"] > 0, "n": len(everyone)}


def interrupted(at: int, expected: list[torch.Tensor]) -> Any:
    """What an interrupt before a certain line leaves."""
    before = settings()

    def told(line: Line, n: int) -> None:
        if n == at:
            sys.settrace(None)
            raise KeyboardInterrupt

    try:
        enter(told)
        return "nothing was interrupted"
    except KeyboardInterrupt:
        pass
    if left := leaves_nothing():
        return left
    if settings() != before:
        return f"{settings()} instead of {before}"
    if any(each._originals for each in COMING):
        return "doors are left"
    return trained(expected)


def main() -> int:
    torch.set_num_threads(1)
    which, every = (*sys.argv[1:], *("first", "1")[len(sys.argv) - 1 :])
    loop = Loop()
    train(loop)
    state = loop.state()
    # Or each fork would look at, and copy, all that torch has brought.
    gc.freeze()
    expected = apart(lambda: trained(state))
    found = dict(list(apart(lambda: places(which)).items())[:: int(every)])
    wrong = {line: got for line, n in found.items() if (got := apart(lambda n=n: interrupted(n, state))) != expected}
    print(json.dumps({"lines": len(found), "wrong": wrong, "expected": expected}))
    return 0


if __name__ == "__main__":
    with kitsune.config.patch(gate=False):
        sys.exit(main())
