"""`kitsune.set_stance`: what becomes of regions that are not known, in the words of `torch.compiler.set_stance`."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from kitsune.accepts import nearest
from kitsune.contexts import apply_stance

__all__ = ["set_stance"]

P = ParamSpec("P")
R = TypeVar("R")

# stance: is nothing recorded, and what becomes of operators that are not known at their place?
STANCES = {
    "default": (False, "record"),
    "eager_then_compile": (False, "record"),
    "force_eager": (True, "record"),
    "eager_on_recompile": (False, "eager"),
    "fail_on_recompile": (False, "fail"),
}
_current = "default"


class set_stance:
    """Say what becomes of code under Kitsune: at once, inside a `with` block, or inside a decorated function.

    "default" and "eager_then_compile": a region runs as eager the first time and is lazy from the second on. "force_eager":
    nothing is recorded. "eager_on_recompile": regions that are known are used, anything new runs as eager and is not recorded.
    "fail_on_recompile": an operator that is not known at its place raises a RuntimeError with the user's line. The stance
    holds for all threads; those that are recording just now take it up at the end of their step. ValueError for other words.
    """

    def __init__(self, stance: str = "default") -> None:
        if stance not in STANCES:
            hint = nearest(stance, STANCES) if isinstance(stance, str) else ""
            raise ValueError(f"there is no stance {stance!r}; Kitsune knows {', '.join(STANCES)}.{hint}")
        self._stance = stance
        # One for each block that is open: the stance to go back to. The first is that from before the call itself.
        self._before = [_current]
        self._fresh = True
        _set(stance)

    def __enter__(self) -> None:
        if self._fresh:
            # `with set_stance(...)`: the call has set it already.
            self._fresh = False
        else:
            self._before.append(_current)
        _set(self._stance)

    def __exit__(self, *error: object) -> None:
        _set(self._before.pop())

    def __call__(self, fn: Callable[P, R]) -> Callable[P, R]:
        # `@set_stance(...)` is for the function's calls alone.
        _set(self._before[0])
        if not callable(fn):
            raise TypeError(f"set_stance decorates functions, but got {fn!r}.")

        @functools.wraps(fn)
        def within(*args: P.args, **kwargs: P.kwargs) -> R:
            with set_stance(self._stance):
                return fn(*args, **kwargs)

        return within

    def __repr__(self) -> str:
        return f"kitsune.set_stance({self._stance!r})"


def _set(stance: str) -> Any:
    global _current
    _current = stance
    apply_stance(*STANCES[stance])
