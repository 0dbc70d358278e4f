"""Ops of no call of torch's API, such as those that C++ makes for `z.real = x`."""

from typing import Any

import torch


def take_stray(recorder: Any, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """Take such an op. Torch has left its function modes on for it, which would have the recorder's own calls taken for the
    program's."""
    hook = recorder.hook
    with torch._C.DisableTorchFunction():
        if hook(args, kwargs):
            return recorder.redo(func, args, kwargs or {})
        try:
            recorder.hook = None
            return recorder.record(func, types, args, kwargs)
        finally:
            recorder.hook = hook
