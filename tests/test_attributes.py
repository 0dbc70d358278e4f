"""What a tensor's attributes may be set to: of a pending one as of any other, and what is refused is so in torch's words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kitsune

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute")
TENSORS: dict[str, Callable[[], Tensor]] = {
    "pending": lambda: torch.arange(3.0).sin(),
    "with a history": lambda: torch.arange(3.0).requires_grad_().sin(),
    "a leaf": lambda: (torch.arange(3.0) * 2).requires_grad_(),
    "whole numbers": lambda: torch.arange(3) * 2,
    "a view": lambda: torch.arange(6.0).sin()[::2],
    "a parameter": lambda: torch.nn.Parameter(torch.arange(3.0)),
}
VALUES: dict[str, Callable[[Tensor], Any]] = {
    "None": lambda t: None,
    "True": lambda t: True,
    "1": lambda t: 1,
    "1.5": lambda t: 1.5,
    "str": lambda t: "x",
    "list": lambda t: [1],
    "class": lambda t: Tensor,
    "array": lambda t: torch.zeros(3).numpy(),
    "itself": lambda t: t,
    "plain": lambda t: torch.tensor([1.0, 2.0, 3.0]),
    "another shape": lambda t: torch.arange(5.0) + 1,
    "whole numbers": lambda t: torch.arange(3) + 1,
    "halves": lambda t: torch.arange(3).bfloat16() + 1,
    "meta": lambda t: torch.ones(3, device="meta"),
    "sparse": lambda t: torch.ones(3).to_sparse(),
    "with a history": lambda t: torch.ones(3, requires_grad=True) * 2,
}
SET = ("data", "grad", "requires_grad", "grad_fn", "is_leaf")


def seen(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return str(value)
    return (value.dtype, value.shape, value.requires_grad, value.is_meta or value.is_sparse or value.tolist())


def outcome(change: Callable[[Tensor], None], name: str, tensor: Callable[[], Tensor]) -> Any:
    """What it raises, or what can be seen of the tensor and what is made of it afterwards."""
    t = tensor()
    try:
        change(t)
    except Exception as error:
        return type(error), str(error), seen(t)
    return seen(getattr(t, name)), seen(t), seen(t + 1), seen(t[1:])


def assert_as_eager(change: Callable[[Tensor], None], name: str, tensor: Callable[[], Tensor]) -> None:
    expected = outcome(change, name, tensor)
    for warmup in (0, 1):
        kitsune.reset()
        for _ in range(3):
            with kitsune.accelerate(device="cpu", warmup=warmup):
                assert outcome(change, name, tensor) == expected


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("tensor", TENSORS)
@pytest.mark.parametrize("name", SET)
def test_an_attribute_is_set_or_refused_as_in_eager(name: str, tensor: str, value: str) -> None:
    assert_as_eager(lambda t: setattr(t, name, VALUES[value](t)), name, TENSORS[tensor])


@pytest.mark.parametrize("tensor", TENSORS)
@pytest.mark.parametrize("name", SET)
def test_an_attribute_is_deleted_or_refused_as_in_eager(name: str, tensor: str) -> None:
    assert_as_eager(lambda t: delattr(t, name), name, TENSORS[tensor])


def test_another_dtype_is_read_where_the_tensor_was_used_before() -> None:
    def step(x: Tensor) -> Any:
        y = x * 2
        before = y + 1
        y.data = (x * 3).long()
        y.add_(1)
        return [seen(t) for t in (before, y, y / 2, y.double().sin())]

    x = torch.arange(4.0) + 0.5
    expected = step(x)
    with kitsune.config.patch(gate=False), kitsune.accelerate(device="cpu"):
        assert [step(x) for _ in range(4)] == [expected] * 4


def test_parts_of_a_complex_result_are_set_as_in_eager() -> None:
    """C++ writes them by operators that are no call of the API."""

    def parts() -> list[torch.Tensor]:
        x = (torch.zeros(3, dtype=torch.cfloat) + 1j).requires_grad_()
        z = x * 2
        z.real = torch.arange(3.0)
        z[1:].imag = torch.ones(2)
        z.abs().sum().backward()
        assert x.grad is not None
        return [z.detach(), x.grad]

    expected = parts()
    for warmup in (0, 1):
        kitsune.reset()
        with kitsune.accelerate(device="cpu", warmup=warmup):
            found = [t for _ in range(4) for t in parts()]
        assert all(torch.equal(a, b) for a, b in zip(expected * 4, found, strict=True))
