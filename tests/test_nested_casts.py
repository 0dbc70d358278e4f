"""Some kernels call operators that autocast gives other types, which a mode that handles the kernel would hide from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import kitsune
from kitsune.ir import Barrier
from kitsune.pipeline import tally
from tests._compare import difference

aten = torch.ops.aten
PLACES = torch.eye(2, 3).expand(2, 2, 3)
CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "affine_grid": lambda x: F.affine_grid(PLACES * x[0, 0], [2, 1, 4, 4], align_corners=False),
    "affine_grid by name": lambda x: aten.affine_grid_generator(PLACES * x[0, 0], [2, 1, 4, 4], False),
    "bilinear": lambda x: F.bilinear(x, x * 2, x.expand(5, 4, 4)),
    "pinv": lambda x: torch.linalg.pinv(x + torch.eye(4)),
    "pinv by name": lambda x: aten.linalg_pinv(x + torch.eye(4)),
}


def passes(call: Callable[[Tensor], Tensor], graded: bool, outside: bool, back_inside: bool = False) -> list[Any]:
    torch.manual_seed(0)
    found: list[Any] = []
    for x in torch.randn(5, 4, 4).unbind():
        x.requires_grad_(graded)
        with torch.autocast("cpu", torch.bfloat16, enabled=not outside):
            seen = call(torch.tanh(x))
            if back_inside:
                seen.float().square().sum().backward()
        if graded and not back_inside:
            seen.float().square().sum().backward()
        found += [seen.detach(), x.grad]
    return found


@pytest.mark.parametrize("warmup", [0, 1])
@pytest.mark.parametrize(("graded", "outside"), [(True, False), (False, False), (True, True)])
@pytest.mark.parametrize("name", list(CALLS))
def test_casts_inside_of_a_kernel_are_eagers(name: str, graded: bool, outside: bool, warmup: int) -> None:
    # Torch has no backward of it under autocast: it multiplies matrices of two types.
    graded = graded and "pinv" not in name
    expected = passes(CALLS[name], graded, outside)
    assert expected[0].dtype is (torch.float32 if outside or "bilinear" in name else torch.bfloat16)
    kitsune.reset()
    with kitsune.accelerate(device="cpu", warmup=warmup):
        found = passes(CALLS[name], graded, outside)
    assert not [told for a, b in zip(expected, found, strict=True) if (told := difference(a, b))]


@pytest.mark.parametrize("warmup", [0, 1])
@pytest.mark.parametrize("name", [name for name in CALLS if "pinv" not in name])
def test_casts_inside_of_a_backwards_kernel_are_eagers(name: str, warmup: int) -> None:
    expected = passes(CALLS[name], True, False, True)
    kitsune.reset()
    with kitsune.accelerate(device="cpu", warmup=warmup):
        found = passes(CALLS[name], True, False, True)
    assert not [told for a, b in zip(expected, found, strict=True) if (told := difference(a, b))]


def test_where_autocast_is_off_they_are_recorded_like_others() -> None:
    kitsune.reset()
    before = Counter(tally.passed_through)
    with kitsune.accelerate(device="cpu"):
        passes(CALLS["bilinear"], False, True)
    assert not [told for told, _ in Counter(tally.passed_through) - before if told is Barrier.CASTS]
