"""Interrupts at chosen lines."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any


def interrupted_at(k: int, call: Callable[[], Any], *files: str) -> bool:
    """An interrupt comes at the `k`th line that a call goes through of these files of Kitsune's, if there are as many."""
    n_lines, ends = 0, tuple(os.path.join("", "kitsune", *file.split("/")) for file in files)

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal n_lines
        if not frame.f_code.co_filename.endswith(ends):
            return None
        n_lines += event == "line"
        if event == "line" and n_lines == k:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False
