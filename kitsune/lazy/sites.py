"""The line of the user's program that is running."""

import os
import sys
import threading
from collections.abc import Callable
from types import CodeType
from typing import Any, TypeVar

import torch

from kitsune.ir import Site

_HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# The demo lives in the package but is a user of it.
_USERS = os.path.join(_HERE, "demo") + os.sep
_INTERNAL = (_HERE + os.sep, os.path.dirname(os.path.abspath(torch.__file__)) + os.sep, "<frozen", "<string>", "<kitsune ")
_STDLIB = tuple(
    os.path.join(os.path.dirname(os.__file__), name) for name in ("contextlib.py", "functools.py", "copy.py", "pickle.py")
)
_is_internal: dict[str, bool] = {}
UNKNOWN = object()
F = TypeVar("F", bound=Callable[..., Any])


class _Call(threading.local):
    """What is known of the line that has made the call which torch is making in this thread. The ops of one have it in common,
    and to look for it for each took 5 % of the instructions of BERT's first step (CPU host)."""

    site: Any = UNKNOWN


call = _Call()
# The function that has torch make calls.
_makes: CodeType | None = None


def makes_calls(function: F) -> F:
    """Has torch make one call, for which it sets `call.site` to UNKNOWN, and back afterwards."""
    global _makes
    _makes = function.__code__
    return function


def user_site(n_own: int = 1) -> Site | None:
    """The innermost frame outside torch, Kitsune and the standard library's plumbing; None in a thread of the autograd engine.

    So many frames behind this one are known to be Kitsune's: to pass one by makes an object of it.
    """
    frame, in_call, found = sys._getframe(n_own), False, None
    while frame is not None:
        code = frame.f_code
        if code is _makes and not in_call:
            if call.site is not UNKNOWN:
                return call.site
            in_call = True
        name = code.co_filename
        internal = _is_internal.get(name)
        if internal is None:
            internal = _is_internal[name] = name.startswith(_INTERNAL + _STDLIB) and not name.startswith(_USERS)
        if not internal:
            found = Site(name, frame.f_lineno)
            break
        frame = frame.f_back  # type: ignore[assignment]
    if in_call:
        call.site = found
    return found
