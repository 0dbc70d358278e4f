"""What a formula is where neither the interpreter nor a CPU tells it from a wrong one: types on the way, NaN, booleans."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kitsune.codegen import differences, lowering, render, why_not_lowered
from kitsune.codegen.exactness import CANCELS, DISTANCE, _without_toolkit
from kitsune.codegen.reducers import identity
from tests.codegen.build import build

aten = torch.ops.aten
FORMULAS: list[tuple[str, Callable[..., Any], torch.dtype, str]] = [
    # The helpers keep a NaN; numbers without one are compared by Triton's own.
    ("clamp", lambda x: aten.clamp(x, -0.5, 0.5), torch.float32, "minimum(maximum(x0, s0), s1)"),
    ("clamp", lambda x: aten.clamp(x, -2, 3), torch.int64, "tl.minimum(tl.maximum(x0, s0), s1)"),
    # What follows in the kernel is computed in the type of the sign.
    ("sign", aten.sign, torch.float64, "(x0 > 0).to(tl.float64) - (x0 < 0).to(tl.float64)"),
    ("sign", aten.sign, torch.float32, "(x0 > 0).to(tl.float32) - (x0 < 0).to(tl.float32)"),
    ("sign", aten.sign, torch.int32, "(x0 > 0).to(tl.int8) - (x0 < 0).to(tl.int8)"),
    # As a number of one bit, True is -1 on a device.
    ("sign", aten.sign, torch.bool, "x0"),
    ("signbit", aten.signbit, torch.bool, "x0 & (x0 == 0)"),
    ("signbit", aten.signbit, torch.uint8, "x0 < 0"),
    # Lists are raised to a power by the library, single tensors by what eager has for small ones.
    ("a list's power", lambda x: aten._foreach_pow([x], 2)[0], torch.float32, "libdevice.pow(x0, 2.0)"),
    ("power", lambda x: aten.pow(x, 2), torch.float32, "x0 * x0"),
    ("power of 8", lambda x: aten.pow(x, 8), torch.int64, " * ".join(["x0"] * 8)),
    # Numbers beyond 32 bits keep their last byte.
    ("cast", lambda x: aten._to_copy(x, dtype=torch.uint8), torch.float32, "x0.to(tl.int64).to(tl.uint8)"),
    ("floor", lambda x: aten.div(x, 4.0, rounding_mode="floor"), torch.float32, "tl.where(s0 == 0, t3, snap(t2, t3))"),
    ("truncation", lambda x: aten.div(x, 4.0, rounding_mode="trunc"), torch.float32, "libdevice.trunc(x0 * tl.div_rn(1.0, s0))"),
    ("truncation", lambda x: aten.div(x, 4, rounding_mode="trunc"), torch.int32, "x0 // s0.to(tl.int32)"),
    ("cast", lambda x: aten._to_copy(x, dtype=torch.int8), torch.float32, "x0.to(tl.int32).to(tl.int8)"),
]


@pytest.mark.parametrize(("name", "call", "dtype", "formula"), FORMULAS, ids=lambda part: str(part) if type(part) is str else "")
def test_formula(name: str, call: Callable[..., Any], dtype: torch.dtype, formula: str) -> None:
    text = render(build(call, [torch.zeros(8, dtype=dtype)], "kernel").kernel).text
    assert f"\n    v0 = {formula}  #" in text


REFUSED: list[tuple[Callable[..., Any], torch.dtype, torch.dtype]] = [
    (aten.amax, torch.bool, torch.uint8),
    (lambda x: aten.max(x, 0), torch.bool, torch.uint8),
    (lambda x: aten.pow(x, 9), torch.int64, torch.float32),
]


@pytest.mark.parametrize(("call", "dtype", "other"), REFUSED, ids=["extreme", "extreme and place", "large power"])
def test_what_is_refused_of_one_type_is_lowered_of_another(
    call: Callable[..., Any], dtype: torch.dtype, other: torch.dtype
) -> None:
    reasons = {d: why_not_lowered(build(call, [torch.zeros(8, dtype=d)], "kernel").ops[0]) for d in (dtype, other)}
    assert reasons[dtype] is not None and reasons[other] is None


def test_a_distance_is_said_in_units_or_as_what_cancels() -> None:
    measured = {one.op: one.measured for one in differences("fast", toolkit=False)}
    inexact = {**DISTANCE, **_without_toolkit()}
    assert {ulp == CANCELS for op, (ulp, _) in inexact.items()} == {False, True}
    for op, (ulp, _) in inexact.items():
        expected = "what is left after cancellation" if ulp == CANCELS else f"at most {ulp} units in the last place of float32"
        assert measured[op] == expected


@pytest.mark.parametrize("kind", ["max", "first max"])
def test_what_changes_no_result_is_the_least_number_beside_a_maximum_and_the_largest_beside_a_minimum(kind: str) -> None:
    for dtype in (torch.int32, torch.int64, torch.uint8):
        limits = torch.iinfo(dtype)
        assert identity(kind, dtype) == str(limits.min)
        assert identity(kind.replace("max", "min"), dtype) == str(limits.max)
    assert identity(kind, torch.float32) == "float('-inf')"
    assert identity("sum", torch.int64) == "0"


@pytest.mark.parametrize(("dtype", "writes"), [(torch.float32, True), (torch.bfloat16, True), (torch.float64, False)])
def test_the_error_function_is_written_out_where_its_digits_are_known(
    dtype: torch.dtype, writes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is rendered is kept: of each an own program.
    for written, program in ((True, torch.erf), (False, lambda x: torch.erf(x).neg())):
        monkeypatch.setattr(lowering, "writes_erf", lambda written=written: written)
        text = render(build(program, [torch.zeros(8, dtype=dtype)], "kernel").kernel).text
        called = "libdevice.erf(" in text
        assert called is not (writes and written)
