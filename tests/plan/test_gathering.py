"""Sums across rows are made by the kernel that has the rows in registers, where there are enough rows for the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import kitsune
from kitsune.codegen import render, text_key
from kitsune.fusion.group import Group
from kitsune.ir import Kernel, Plan, roots
from kitsune.planning import Planner
from kitsune.scheduler import RATES, Costs, cost
from tests.plan.recorded import launched, plan_of, recorded_again

aten = torch.ops.aten
HALF = torch.bfloat16


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    kitsune.reset()
    yield


def strict(program: Callable[[], Any], fuel: int | None = None) -> Plan:
    return plan_of(program, fuel, numerics="strict")


def in_turn(plan: Plan) -> list[Kernel]:
    return [kernel for launch in plan.launches for kernel in launch.kernels if kernel.gathered]


def backward(shape: tuple[int, ...], more: Callable[[torch.Tensor], Any] = lambda found: None) -> Callable[[], Any]:
    """All gradients of a layer norm before a product, with a residual, and what else is made of the one of its input."""
    a, b = torch.zeros(*shape[:-1], 8, dtype=HALF), torch.zeros(8, shape[-1], dtype=HALF)
    x, rest, w = torch.zeros(shape), torch.zeros(shape), torch.ones(shape[-1])
    mean, rstd = torch.zeros(*shape[:-1], 1), torch.ones(*shape[:-1], 1)

    def program() -> Any:
        wanted = [True, True, True]
        grad = a @ b
        found, *others = aten.native_layer_norm_backward(grad.float(), x, [shape[-1]], mean, rstd, w, w, wanted)
        found = found + rest
        half = found.to(HALF)
        return found, *others, half, half.flatten(0, -2).sum(0).float(), more(found)

    return program


# Rows of 1024 elements are in as many parts as three blocks of each of 132 multiprocessors are, as near as divisors allow.
SHAPES = [((4096, 768), 512), ((64, 197, 768), 394), ((8, 1024, 768), 512), ((65536, 64), 8192)]


@pytest.mark.parametrize(("shape", "parts"), SHAPES)
def test_a_layer_norm_backward_and_the_bias_gradient_behind_it_read_everything_once(shape: tuple[int, ...], parts: int) -> None:
    plan = strict(backward(shape))
    (kernel,) = in_turn(plan)
    rows = torch.Size(shape[:-1]).numel()
    assert kernel.domain == (rows // parts, parts, shape[-1]) and (kernel.reduced, len(kernel.gathered)) == (1, 3)
    assert sum(access.strides[-1] == 1 and access.strides[0] > 0 for access in kernel.loads) == 3
    partial = [store for store in kernel.stores if not store.access.strides[0]]
    assert len(partial) == 3 and all(s.access.value.type.dtype is torch.float32 for s in partial)
    # The partial sums are added up by what else starts, and nothing of the size of the rows is read again.
    others = [k for launch in plan.launches for k in launch.kernels if k is not kernel]
    assert {name.partition(" ")[0] for name in launched(plan)} <= {kernel.name, "mm", "sum", "sum_to_copy"}
    assert all(k.n_elements <= parts * shape[-1] for k in others)


def test_few_rows_are_summed_by_a_kernel_of_their_own() -> None:
    assert not in_turn(strict(backward((256, 768))))


def test_rows_that_are_too_long_for_registers_are_not_gone_through_in_turn() -> None:
    assert not in_turn(strict(backward((1024, 8192))))


def test_what_is_made_of_a_sum_is_made_after_the_last_row() -> None:
    def centred(found: torch.Tensor) -> torch.Tensor:
        return found - found.sum(0)

    plan = strict(backward((4096, 768), centred))
    (kernel,) = in_turn(plan)
    steps = [step.op for step in kernel.steps]
    totals = {v.storage for number in kernel.gathered for v in steps[number].results}
    assert not any(v.storage in totals for op in steps for v in op.inputs)


def test_without_fuel_sums_stay_where_they_are() -> None:
    plan = strict(backward((4096, 768)))
    used = next(n for n in range(100) if in_turn(strict(backward((4096, 768)), n)))
    assert in_turn(plan) and not in_turn(strict(backward((4096, 768)), used - 1))


def test_a_group_takes_only_sums_of_other_rows_and_nothing_that_reads_them() -> None:
    x = torch.zeros(64, 32)

    def reasons(program: Callable[[], Any], across: set[str]) -> list[str]:
        graph = recorded_again(program)
        ops = [op for op in graph.ops if op.kind.name in ("POINTWISE", "REDUCTION")]
        numbers = frozenset(k for k, op in enumerate(ops) if op.target._opname in across)
        group = Group(roots(graph), across=numbers)
        return [reason for k, op in enumerate(ops) if (reason := group.add(k, op)) is not None]

    assert reasons(lambda: (x.softmax(1), (x * 2).sum(0)), {"sum"}) == []
    assert reasons(lambda: (x.softmax(1), x.amax(0)), {"amax"}) == ["it is no sum of all rows"]
    assert reasons(lambda: (x.softmax(1), x.sum(1)), {"sum"}) == ["it adds up other rows"]
    # As many elements as a row has, and no row of them.
    assert reasons(lambda: (x * 2, x[0] + 1), set()) == ["it works on another shape"]
    assert reasons(lambda: x.softmax(1) - x.sum(0), {"sum"}) == ["it reads a sum that is complete only after the last row"]


def test_the_number_of_parts_is_of_the_device_and_the_text_of_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = recorded_again(backward((8192, 768)))
    (one,) = in_turn(Planner(Costs(RATES["sm_90"]), numerics="strict").plan(graph))
    monkeypatch.setattr(cost, "BESIDE", 1000)
    (other,) = in_turn(Planner(Costs(RATES["sm_90"]), numerics="strict").plan(graph))
    assert (one.domain[1], other.domain[1]) == (512, 1024)
    assert text_key(one) == text_key(other) and render(one).text == render(other).text
