from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import kitsune


@pytest.fixture(autouse=True)
def fresh(request: pytest.FixtureRequest) -> Iterator[None]:
    kitsune.reset()
    # The models of the other tests are on the CPU, also on a machine that has a GPU.
    with kitsune.config.patch(device=None if request.node.get_closest_marker("gpu") else "cpu"):
        yield
    gc.collect()
    assert _get_current_dispatch_mode_stack() == [], "a recording was left open"
