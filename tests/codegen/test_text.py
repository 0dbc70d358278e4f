"""What a kernel's text depends on: its structure, and nothing else."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
import torch

from kitsune.codegen import parameters_of, render, text_key, why_not_batched, why_not_lowered
from kitsune.codegen.keys import call_key
from kitsune.codegen.render import _rendered, body_of
from kitsune.ir import Slot
from kitsune.ir.program import Pointer, Scalar, Size, SlotAddress, Stride
from kitsune.planning import Planner
from kitsune.scheduler import RATES, Costs
from tests.codegen.build import Built, build
from tests.codegen.samples import SAMPLES, draw
from tests.plan.test_corpus_plans import CORPUS, graph_of


def layer(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return torch.relu(x + bias) * 0.5


def built(*shape: int, dtype: torch.dtype = torch.float32, name: str = "layer", moving: tuple[float, ...] = ()) -> Built:
    return build(layer, [torch.randn(*shape, dtype=dtype), torch.randn(shape[-1], dtype=dtype)], name, moving)


def test_another_batch_or_layer_size_has_the_same_text() -> None:
    first, second = built(4, 8).kernel, built(32, 100).kernel
    assert render(first).text == render(second).text
    assert text_key(first) == text_key(second)


def test_a_moving_number_is_a_parameter_like_a_constant() -> None:
    constant, moving = built(4, 8).kernel, built(4, 8, moving=(0.5,)).kernel
    assert render(constant).text == render(moving).text
    assert Scalar(Slot(0), "fp32") in render(moving).parameters
    assert Scalar(0.5, "fp32") in render(constant).parameters


def test_a_moving_number_may_be_read_from_memory() -> None:
    kernel = built(4, 8, moving=(0.5,)).kernel
    program = render(kernel, slots_in_memory=True)
    assert "s0 = tl.load(s0_at).to(tl.float32)" in program.text
    assert program.parameters == parameters_of(kernel, slots_in_memory=True)
    assert program.parameters[-1] == SlotAddress(0)
    constant = built(4, 8).kernel
    assert render(constant, slots_in_memory=True) == render(constant)


def test_parameters_are_in_the_order_of_the_signature() -> None:
    kernel = built(4, 8).kernel
    program = render(kernel)
    assert program.parameters == parameters_of(kernel)
    assert program.parameters == (Pointer(0), Pointer(1), Pointer(2), Size(), Size(1), Scalar(0.5, "fp32"))


def test_a_transposed_operand_passes_its_stride() -> None:
    kernel = build(torch.add, [torch.randn(5, 7), torch.randn(7, 5).t()], "k").kernel
    assert Stride(1, 1, counts=False) in render(kernel).parameters


def test_a_kernel_may_be_called_like_a_function_that_it_calls() -> None:
    kernel = build(lambda x, y: torch.lerp(x, y, 0.3), [torch.randn(4), torch.randn(4)], "lerp").kernel
    assert render(kernel).name == "kernel_lerp"


def everything() -> list[tuple[Any, str]]:
    found = []
    for sample in SAMPLES:
        for dtype in sample.dtypes[:2]:
            for shape in ((3, 5), (4,)):
                try:
                    kernel = build(sample.call, draw(sample, dtype, shape), "k", sample.moving).kernel
                except (RuntimeError, NotImplementedError):
                    continue
                found.append((text_key(kernel), render(kernel).text + render(kernel, slots_in_memory=True).text))
    return found


def test_keys_are_equal_exactly_if_texts_are() -> None:
    texts: dict[Any, str] = {}
    for key, text in everything():
        assert texts.setdefault(key, text) == text
    keys: dict[str, Any] = {}
    for key, text in texts.items():
        assert keys.setdefault(text, key) == key


@pytest.mark.parametrize("name", ["bert-small-amp-cuda", "resnet18-small-amp-cuda", "gpt2-small-fp32-cpu"])
def test_what_is_known_of_a_kernel_is_what_would_be_made_of_it(name: str) -> None:
    graph = graph_of(CORPUS / f"{name}.jsonl.gz")
    plan = Planner(Costs(RATES["sm_90"]), numerics="strict", slots_in_kernels=True).plan(graph)
    kernels = [kernel for launch in plan.launches for kernel in launch.kernels]
    n_known = len({call_key(kernel) for kernel in kernels})
    assert n_known < len(kernels), "some are equal"
    for in_memory in (False, True):
        for kernel in kernels:
            made = tuple(p.meaning for p in body_of(kernel, in_memory).parameters)
            assert repr(parameters_of(kernel, in_memory)) == repr(made)
            # Also of the names: a program is called by that of its first kernel.
            assert render(kernel, False, in_memory) == _rendered(kernel, False, in_memory)


@pytest.mark.parametrize(("one", "other"), [(0.0, -0.0), (1, True), (2.0, 2), (0.25, 0.5)])
def test_numbers_that_python_takes_for_equal_stay_apart(one: float, other: float) -> None:
    for number in (one, other):
        kernel = build(lambda x, number=number: x * number, [torch.randn(64)], "k").kernel
        made = tuple(p.meaning for p in body_of(kernel, False).parameters)
        assert repr(parameters_of(kernel)) == repr(made)


@pytest.mark.parametrize(("exponent", "text"), [(3.0, "v0 = (x0 * x0) * x0"), (0.5, "v0 = tl.sqrt_rn(x0)")])
def test_an_exponent_that_eager_has_a_kernel_for_stands_in_the_text_unless_it_moves(exponent: float, text: str) -> None:
    constant, moving, other = (
        build(lambda x, e=e: x**e, [torch.randn(64)], "k", moves).kernel
        for e, moves in ((exponent, ()), (exponent, (exponent,)), (1.7, ()))
    )
    assert text in render(constant).text
    assert "pow_scalar(x0, s0)" in render(moving).text and "pow_scalar(x0, s0)" in render(other).text
    assert text_key(constant) != text_key(other)


def test_a_number_that_moves_is_in_no_batch_with_one_that_does_not() -> None:
    # A row of the batch has the address of the one, and the other itself.
    moving, constant = (build(lambda x: x * 0.5, [torch.randn(64)], "k", moving).kernel for moving in ((0.5,), ()))
    assert text_key(moving) != text_key(constant)


def test_two_thousand_ops_are_keyed_in_time() -> None:
    kernel = build(lambda x, y: [x.add_(y, alpha=0.5) for _ in range(20)], [torch.randn(8), torch.randn(8)], "k").kernel
    text_key(kernel)
    start = time.perf_counter()
    for _ in range(100):
        text_key(kernel)
    assert time.perf_counter() - start < 0.2


def test_what_cannot_be_batched() -> None:
    flat = build(lambda x: x * 0.5, [torch.randn(64)], "k").kernel
    assert why_not_batched(flat) is None and why_not_batched(built(4, 8).kernel) is None
    many = build(lambda *tensors: [x * 0.5 for x in tensors], [torch.randn(64) for _ in range(33)], "k").kernel
    assert why_not_batched(many) == "it has more than 64 operands"
    with pytest.raises(ValueError, match="cannot be batched"):
        render(many, batched=True)


def test_only_the_innermost_size_and_strides_of_what_lies_side_by_side_have_to_be_aligned() -> None:
    """A weight of 3 x 3 that is brought into channels-last is read and written in vectors, though 9 is no multiple of 16."""
    weight = torch.randn(32, 16, 3, 3)
    channels_last = weight.to(memory_format=torch.channels_last).permute(0, 2, 3, 1).reshape(32, 9, 16)
    kernel = build(torch.add, [channels_last, weight.reshape(32, 16, 9).transpose(1, 2)], "k").kernel
    counting = {p for p in render(kernel).parameters if getattr(p, "counts", False)}
    assert counting == {Size(), Size(2)}


@pytest.mark.parametrize(
    ("call", "inputs", "reason"),
    [
        (torch.digamma, [torch.ones(3)], "has no lowering rule"),
        (torch.exp, [torch.ones(3, dtype=torch.complex64)], "works on torch.complex64"),
        (lambda x: torch.round(x, decimals=2), [torch.ones(3)], "rounds to decimals"),
        (lambda x: torch.pow(x, -3), [torch.ones(3, dtype=torch.int64)], "has no|power that is not a small number|negative"),
        (lambda x: torch._foreach_add([x, x], 1.0), [torch.ones(3)], "list of several tensors"),
    ],
)
def test_why_not_lowered(call: Any, inputs: list[torch.Tensor], reason: str) -> None:
    try:
        ops = build(call, inputs, "k").ops
    except RuntimeError as error:
        assert re.search(reason, str(error))
        return
    assert any(re.search(reason, why_not_lowered(op) or "") for op in ops)


def test_small_powers_are_products_and_quotients() -> None:
    texts = {e: render(build(lambda x, e=e: torch.pow(x, e), [torch.ones(4)]).kernel).text for e in (0, 1, 2, 3, -1, -2, 4)}
    assert [e for e, text in texts.items() if "pow(" in text] == [4]


@pytest.mark.parametrize(("dtype", "loses"), [(torch.float16, True), (torch.bfloat16, False), (torch.float32, False)])
def test_a_nan_loses_its_sign_in_float16_alone(dtype: torch.dtype, loses: bool) -> None:
    """As in eager on a device, which widens it; a CPU does not, so that the interpreter's results say nothing."""
    text = render(build(torch.signbit, [torch.ones(4, dtype=dtype)]).kernel).text
    assert ("x0 == x0" in text) is loses


@pytest.mark.parametrize("mode", ["floor", "trunc"])
@pytest.mark.parametrize(("number", "sure"), [(0.7, True), (3.0, True), (0.0, True), (1.1, False)])
def test_a_quotient_that_is_rounded_is_a_kernels_where_its_reciprocal_is_one_number(mode: str, number: float, sure: bool) -> None:
    (op,) = build(lambda x: torch.div(x, number, rounding_mode=mode), [torch.randn(8)], "k").ops
    assert (why_not_lowered(op) is None) is sure
    (op,) = build(lambda x: torch.div(x, number, rounding_mode=mode), [torch.randn(8)], "k", (number,)).ops
    assert "depends on the precision" in str(why_not_lowered(op)), "it moves, and may become any number"


@pytest.mark.parametrize("program", [lambda x: x / 1.1, lambda x: torch._foreach_div([x], 1.1)[0]])
def test_the_reciprocal_of_a_number_is_divided_in_float64(program: Any) -> None:
    text = render(build(program, [torch.randn(8)], "k").kernel).text
    assert '"s0": "fp64"' in text and "(tl.full((), 1.0, tl.float64) / s0).to(tl.float32)" in text
    (number,) = build(program, [torch.randn(8)], "k", (1.1,)).slots
    assert number == 1.1
