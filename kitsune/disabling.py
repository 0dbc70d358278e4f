"""`disable`: plain PyTorch for a while, in the midst of what is accelerated."""

import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, overload

import torch

from kitsune.contexts import here as _thread
from kitsune.ir import Barrier
from kitsune.lazy import Paused

P = ParamSpec("P")
R = TypeVar("R")


class Disable:
    """`with kitsune.disable():` and `@kitsune.disable`: the code inside runs as plain PyTorch."""

    def __init__(self) -> None:
        self._entered = threading.local()

    def __enter__(self) -> "Disable":
        if not hasattr(self._entered, "stack"):
            self._entered.stack = []
        n, paused = len(self._entered.stack), Paused([p.recorder for p in _thread.depth], Barrier.DISABLE)
        try:
            paused.begin()
            self._entered.stack.append(paused)
            return self
        except BaseException:
            del self._entered.stack[n:]
            paused.end()
            raise

    def __exit__(self, *error: object) -> None:
        # At this line an interrupt finds nothing begun, and the block stays disabled.
        n = len(self._entered.stack)
        try:
            self._leave(n)
        finally:
            # An interrupt may have come at any line of it.
            self._leave(n)

    def _leave(self, n: int) -> None:
        while len(self._entered.stack) >= n:
            self._entered.stack[-1].end()
            self._entered.stack.pop()


@overload
def disable(fn: None = None) -> Disable: ...
@overload
def disable(fn: Callable[P, R]) -> Callable[P, R]: ...
def disable(fn: Any = None) -> Any:
    """Run a function, or what is inside `with kitsune.disable():`, as plain PyTorch within an accelerated program."""
    if fn is None:
        return Disable()
    check_callable(fn)

    @functools.wraps(fn)
    def disabled(*args: Any, **kwargs: Any) -> Any:
        with Disable():
            return fn(*args, **kwargs)

    return disabled


def check_callable(fn: Any) -> None:
    """Raise TypeError for what is no function that can be decorated."""
    if isinstance(fn, torch.optim.Optimizer):
        raise TypeError("accelerate() takes a function; wrap an optimizer in kitsune.KitsuneOptimizer(...) instead.")
    if not callable(fn) or isinstance(fn, type):
        raise TypeError(f"accelerate and disable decorate functions, but got {fn!r}. For a block of code use `with`.")
    if inspect.isgeneratorfunction(fn) or inspect.iscoroutinefunction(fn) or inspect.isasyncgenfunction(fn):
        raise TypeError(
            f"{fn.__name__} is a generator or a coroutine: its body runs after the call has returned, outside of the context. "
            "Put `with kitsune.accelerate():` inside its body."
        )
