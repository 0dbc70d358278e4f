"""What Kitsune does while the program captures a CUDA graph of its own: nothing."""

from collections.abc import Callable

from kitsune.background import thread
from kitsune.runtime import SteadyState
from kitsune.runtime.plan_thread import plan_thread


def stand_aside(steady: SteadyState | None) -> Callable[[], None]:
    """To be called before: results stay where they are from now on, for what is captured refers to them, and no thread asks the
    device for anything, which could break the capture off, until what is returned is called."""
    if steady is not None:
        steady.forget()
    plan_thread.settle()
    return thread.pause()
