"""Type promotion: each pair of twelve dtypes, as tensors, 0-dim tensors and Python numbers, in seven operators: eager's dtype and
values, or eager's exception."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kitsune
from tests._compare import value_difference

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
DTYPES = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128),
)
# Python's four kinds of numbers, by the first dtype of each.
NUMBERS: dict[torch.dtype, Any] = {torch.bool: True, torch.int64: 2, torch.float64: 1.1, torch.complex128: 1.5 - 0.5j}
OPS: dict[str, Callable[[Any, Any], Tensor]] = {
    "add": lambda a, b: a + b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "pow": lambda a, b: a**b,
    "where": lambda a, b: torch.where(MASK.to(device_of(a, b)), a, b),
    "eq": lambda a, b: torch.eq(a, b) if isinstance(a, Tensor) else torch.eq(b, a),
    "lt": lambda a, b: a < b,
}
MASK = torch.tensor([True, False, True, False, True])
Outcome = Tensor | str


def device_of(*operands: Any) -> torch.device:
    return next(a.device for a in operands if isinstance(a, Tensor))


def operand(dtype: torch.dtype, how: str, device: str) -> Any:
    """Small numbers, of which no power or quotient is undefined; the second operand of each kind."""
    if how == "number":
        return NUMBERS[dtype]
    values = torch.tensor([1, 2, 3, 1, 2], device=device) if how == "tensor" else torch.tensor(2, device=device)
    made = values.to(dtype)
    return made * 1.1 if dtype.is_floating_point or dtype.is_complex else made


def forms(dtype: torch.dtype) -> list[str]:
    return ["tensor", "0-dim", *(["number"] if dtype in NUMBERS else [])]


def outcome(call: Callable[[], Tensor]) -> Outcome:
    try:
        return call()
    except (RuntimeError, TypeError, NotImplementedError) as error:
        return type(error).__name__


def outcomes(dtype: torch.dtype, other: torch.dtype, device: str) -> dict[str, Outcome]:
    """What all operators make of a pair, either way round."""
    found: dict[str, Outcome] = {}
    a = operand(dtype, "tensor", device)
    for how in forms(other):
        b = operand(other, how, device)
        for name, op in OPS.items():
            found[f"{name} {how}"] = outcome(lambda op=op, b=b: op(a, b))  # type: ignore[misc]
            if how != "tensor":
                found[f"{name} {how} first"] = outcome(lambda op=op, b=b: op(b, a))  # type: ignore[misc]
    return found


def differences(expected: dict[str, Outcome], got: dict[str, Outcome]) -> list[str]:
    wrong = []
    for name, theirs in expected.items():
        mine = got[name]
        if isinstance(theirs, str) or isinstance(mine, str):
            told = None if isinstance(theirs, str) and theirs == mine else f"{mine!r} instead of {theirs!r}"
        else:
            told = f"{mine.dtype} instead of {theirs.dtype}" if mine.dtype is not theirs.dtype else value_difference(theirs, mine)
        if told:
            wrong.append(f"{name}: {told}")
    return wrong


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_recorded_pairs_have_eagers_types_and_values(dtype: torch.dtype) -> None:
    kitsune.reset()
    n_before = 0
    for other in DTYPES:
        expected = outcomes(dtype, other, "cpu")
        with kitsune.accelerate(warmup=0, device="cpu"):
            got = outcomes(dtype, other, "cpu")
        assert not (wrong := differences(expected, got)), f"{dtype} with {other}: {wrong[:5]}"
        n = sum(isinstance(result, Tensor) for result in expected.values())
        counters = kitsune.counters()
        n_run = counters["recorded"] + counters["observed"] - n_before
        assert n_run >= n, f"{n_run} operators recorded of {n}"
        n_before += n_run


# Kernels are written for these.
FUSED = tuple(dtype for dtype in DTYPES if not dtype.is_complex)


@pytest.mark.gpu
@pytest.mark.usefixtures("every_op_a_kernel")
@pytest.mark.parametrize("other", FUSED, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("dtype", FUSED, ids=lambda d: str(d).removeprefix("torch."))
def test_fused_pairs_have_eagers_types_and_values(dtype: torch.dtype, other: torch.dtype) -> None:
    expected = outcomes(dtype, other, "cuda")
    for _ in range(2):  # at first, some ops are made at once
        with kitsune.accelerate(warmup=0, device="cuda"):
            got = outcomes(dtype, other, "cuda")
    assert not (wrong := differences(expected, got)), wrong[:5]
    report = kitsune.explain()
    assert not report.mended
    n = sum(isinstance(result, Tensor) for result in expected.values())
    # Powers of whole numbers by tensors stay with the library, and some of the rest is computed on the host.
    assert report.counters["fused"] >= n // 2, report
