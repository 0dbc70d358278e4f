"""The line of the user's program that is running."""

import os
import sys

import torch

from kitsune.ir import Site

_HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# The demo lives in the package but is a user of it.
_USERS = os.path.join(_HERE, "demo") + os.sep
_INTERNAL = (_HERE + os.sep, os.path.dirname(os.path.abspath(torch.__file__)) + os.sep, "<frozen", "<string>")
_STDLIB = tuple(
    os.path.join(os.path.dirname(os.__file__), name) for name in ("contextlib.py", "functools.py", "copy.py", "pickle.py")
)
_is_internal: dict[str, bool] = {}


def user_site() -> Site | None:
    """The innermost frame outside torch, Kitsune and the standard library's plumbing; None in a thread of the autograd engine."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        internal = _is_internal.get(name)
        if internal is None:
            internal = _is_internal[name] = name.startswith(_INTERNAL + _STDLIB) and not name.startswith(_USERS)
        if not internal:
            return Site(name, frame.f_lineno)
        frame = frame.f_back  # type: ignore[assignment]
    return None
