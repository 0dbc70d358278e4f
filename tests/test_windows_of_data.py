"""Windows that move along one tensor: what is written, then viewed in a kernel, is read where the window is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kitsune
from tests.runtime.repeated import graphs

STEPS = 8
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "flat": lambda x: x.view(-1),
    "transposed": lambda x: x.transpose(0, 1),
    "a part": lambda x: x[1:],
    "expanded": lambda x: x.expand(2, 3, 5),
    "anywhere": lambda x: x.as_strided((2, 2), (5, 1)),
    "whole": lambda x: x,
}


def run(data: Tensor, view: Callable[[Tensor], Tensor], first: int, writes: bool) -> list[Any]:
    found = []
    for k in range(STEPS):
        window = data[3 * k + first : 3 * k + first + 3]
        if writes:
            window.mul_(2)
        found.append(view(window) * 3 + 1)
        found.append(view(window))
        kitsune.flush()
    return [(t.tolist(), t.storage_offset() if k % 2 else 0) for k, t in enumerate(found)]


@pytest.mark.parametrize("how", ["op by op", "replayed", "by plan"])
@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize("writes", [True, False])
@pytest.mark.parametrize("name", list(VIEWS))
def test_each_window_is_its_own(name: str, writes: bool, first: int, how: str) -> None:
    data = torch.arange(200.0).view(40, 5).sin()
    expected = run(data.clone(), VIEWS[name], first, writes)
    around: dict[str, Any] = {"op by op": contextlib.nullcontext(), "replayed": graphs(kernels=False), "by plan": graphs()}
    with around[how], kitsune.config.patch(gate=False), kitsune.accelerate(device="cpu", warmup=0):
        assert run(data.clone(), VIEWS[name], first, writes) == expected
        assert kitsune.counters()["recorded"]
