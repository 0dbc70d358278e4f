"""Numbers that autograd has saved as tensors are used as such: torch hands them to a dispatch mode as plain numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kitsune

NUMBERS: dict[str, Any] = {"int": 4, "float": 2.5, "-0.0": -0.0, "nan": float("nan"), "bool": True}
WIDE = torch.arange(3.0, dtype=torch.float64)
USES: dict[str, Callable[[Tensor], Any]] = {
    "detach": lambda v: v.detach(),
    "numpy": lambda v: v.detach().cpu().numpy(),
    "write to an alias": lambda v: v.detach().zero_(),
    "write": lambda v: v.zero_(),
    "item": lambda v: v.item(),
    "clone": lambda v: v.clone(),
    "view": lambda v: v.view(1),
    "list": lambda v: torch.stack([v, v]),
    "index": lambda v: torch.arange(6.0)[v] if v.dtype is torch.int64 else None,
    "into a tensor": lambda v: torch.ones(3).copy_(v),
    "in a keyword": lambda v: torch.clamp(torch.arange(6.0), min=v),
    "beside a plain tensor": lambda v: torch.atan2(v, WIDE),
    "in a sum": lambda v: torch.ones(3, dtype=torch.float16) + v,
}


def saved(number: Any) -> Tensor:
    return (torch.ones(3, requires_grad=True) * number).grad_fn._saved_other  # type: ignore[union-attr, no-any-return]


@pytest.mark.parametrize("number", NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_saved_number_is_a_tensor(use: Callable[[Tensor], Any], number: Any) -> None:
    value = saved(number)
    expected = repr((use(value), value))
    for _ in range(3):
        with kitsune.accelerate(device="cpu"):
            value = saved(number)
            assert repr((use(value), value)) == expected


def test_which_of_two_equal_numbers_is_meant_is_not_guessed() -> None:
    with kitsune.accelerate(device="cpu"):
        one, other = saved(4), saved(4)
        with pytest.raises(RuntimeError, match="Expected a value of type"):
            torch.stack([one, other])


def test_a_number_that_torch_refuses_is_refused() -> None:
    with kitsune.accelerate(device="cpu"), pytest.raises(RuntimeError, match="Expected a value of type"):
        torch.ops.aten.clone.default(4, memory_format=None)
