from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import kitsune


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    kitsune.reset()
    with kitsune.config.patch(device=None):
        yield
    gc.collect()
    assert _get_current_dispatch_mode_stack() == [], "a recording was left open"
