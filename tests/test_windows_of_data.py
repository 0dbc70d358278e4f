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


def two_windows(data: Tensor, distances: list[float], of: str = "data") -> list[Any]:
    """What two windows of one tensor give that are so far from each other, in whole elements; they are added up if it is a
    whole number, and that raises where they overlap."""
    found: list[Any] = []
    for k, distance in enumerate(distances, 4):
        whole = data if of == "data" else data * 1
        if of == "a result":
            kitsune.flush()
        first, second = whole[k : k + 4], whole[k + int(distance) : k + int(distance) + 4]
        if of == "views of a result":
            kitsune.flush()
        product = (first * 3) * (second + 1)
        try:
            if distance == int(distance):
                first.add_(second)
        except RuntimeError as error:
            found.append(str(error).splitlines()[0])
        found.append((product, second * 2))
        kitsune.flush()
    return [x if isinstance(x, str) else tuple(t.tolist() for t in x) for x in found]


DATA = torch.arange(40.0).sin()
DISTANCES = [4, 4, 4, 5, 4, 0, 2, 4, -2, -4, 4, 1, 5]
# What is known of an addition that was made tells nothing of another distance, also where the windows came with a known product.
ADDED_LATE = [4.5, 4.5, 1.5, 1.5, 4, 1, 4, 1]


@pytest.mark.parametrize("of", ["data", "a result", "views of a result"])
@pytest.mark.parametrize("warmup", [0, 1])
@pytest.mark.parametrize("distances", [DISTANCES, ADDED_LATE])
def test_two_windows_lie_to_each_other_as_they_do(distances: list[float], warmup: int, of: str) -> None:
    expected = two_windows(DATA.clone(), distances, of)
    assert sum(isinstance(x, str) for x in expected) >= 2
    with kitsune.config.patch(gate=False), kitsune.accelerate(device="cpu", warmup=warmup):
        assert two_windows(DATA.clone(), distances, of) == expected


@pytest.mark.parametrize("of", ["data", "a result", "views of a result"])
def test_where_two_windows_begin_is_not_what_a_region_is_known_by(of: str) -> None:
    data = DATA.clone()
    kitsune.reset()
    with kitsune.config.patch(gate=False), kitsune.accelerate(device="cpu"):
        two_windows(data, [4, 4, -4] * 4, of)
    # One for each distance, and one that makes the result; views of that say where they begin.
    assert kitsune.counters()["regions"] == {"data": 2, "a result": 3, "views of a result": 14}[of]


def test_an_operator_that_is_refused_leaves_nothing_of_where_its_windows_were() -> None:
    data, shared = DATA.clone(), torch.from_numpy(DATA.numpy())
    kitsune.reset()
    with kitsune.config.patch(gate=False), kitsune.accelerate(device="cpu"):
        for k in range(6):
            refused = torch.cat([data[k : k + 2], data[2 * k + 8 : 2 * k + 10], shared])
            two_windows(data, [4])
            assert refused.shape == (44,)
    assert kitsune.counters()["regions"] == 1
