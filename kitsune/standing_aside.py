"""What Kitsune does while the program captures a CUDA graph of its own: nothing."""

from collections.abc import Callable
from functools import partial

from kitsune.background import thread
from kitsune.runtime import SteadyState
from kitsune.runtime.plan_thread import plan_thread


def stand_aside(steady: SteadyState | None, ends: list[Callable[[], None]], forgets: bool) -> None:
    """To be called before, for each pipeline; `forgets` says whether it is the calling thread's. Results stay where they are from
    now on, for what is captured may refer to them. No thread asks the device for anything, which could break the capture off,
    until what `ends` gets is called."""
    if steady is not None:
        # Another thread may be in the middle of a replay.
        (steady.forget if forgets else steady.stay)()
    plan_thread.settle()
    who = object()
    ends.append(partial(thread.go_on, who))
    thread.pause(who)
