"""The call lanes that are open in each thread."""

import threading
from typing import Any

import torch

from kitsune.lazy.call_lane import CallLane

_here = threading.local()


def lanes() -> list[CallLane]:
    """The lanes that are open in this thread."""
    try:
        return _here.lanes  # type: ignore[no-any-return]
    except AttributeError:
        _here.lanes = []
        return _here.lanes  # type: ignore[no-any-return]


def on_top() -> CallLane | None:
    """The lane that the next call of torch's API would come to."""
    n = torch._C._len_torch_function_stack()
    mode: Any = torch._C._get_function_stack_at(n - 1) if n and torch._C._is_torch_function_mode_enabled() else None
    return mode if isinstance(mode, CallLane) else None
