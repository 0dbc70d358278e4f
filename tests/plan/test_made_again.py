"""Values that follow from fewer bytes than they take are made again where the backward reads them, to the same bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import kitsune.scheduler.cost as cost
from kitsune.ir import Graph, Kind, verify
from kitsune.planning import Planner
from kitsune.scheduler import RATES, Costs, dead_code
from kitsune.scheduler.made_again import made_again
from tests.runtime.checked import record
from tests.runtime.in_double import replayed, run_by_plan

COSTS = Costs(RATES["sm_90"])


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """However little it saves."""
    monkeypatch.setattr(cost, "AGAIN_BYTES", 0)


def again(graph: Graph) -> Graph:
    found = made_again(graph, lambda op: None, COSTS)
    verify(found)
    return graph if found is graph else dead_code(found)


def activation() -> list[torch.Tensor]:
    """An activation written out in float32, between products in 16 bits, and the gradients through it."""
    torch.manual_seed(0)
    x = torch.randn(6, 8, dtype=torch.bfloat16)
    first, second = (torch.randn(8, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    h = (x @ first).view(2, 3, 8)
    wide = h.float()
    y = 0.5 * h * (1.0 + torch.tanh(0.8 * (wide + 0.04 * wide.pow(3.0))))
    loss = (y.to(torch.bfloat16).view(6, 8) @ second).float().square().sum()
    loss.backward()
    assert first.grad is not None and second.grad is not None
    return [loss, first.grad, second.grad]


def test_an_activation_is_made_again_from_the_product_before_it(small: None) -> None:
    graph, values, scalars = record(activation, warmup=1)
    graph = dead_code(graph)
    found = again(graph)
    late = [op for op in found.ops if op.late]
    assert {op.target._opname for op in late} >= {"tanh", "pow", "mul", "add"}
    assert all(op.kind is Kind.POINTWISE for op in late)
    first, second = (replayed(g, values, scalars) for g in (graph, found))
    assert all(torch.equal(first[v.id], second[v.id]) for v in graph.outputs)
    # Behind the second product nothing of the first half is read but what the products made.
    products = [n for n, op in enumerate(found.ops) if op.kind is Kind.GEMM]
    made = {v.storage for op in found.ops[products[0] + 1 : products[1]] if op.kind is Kind.POINTWISE for v in op.results}
    reading = [op for op in found.ops[products[1] + 1 :] if op.kind is not Kind.VIEW]
    crossing = {v.storage for op in reading for v in op.inputs} & made
    gemms = {v.storage for op in reading if op.kind is Kind.GEMM for v in op.inputs}
    assert crossing <= gemms, "what a product reads must be in memory"


def test_a_plan_with_values_made_again_gives_the_same_bits(small: None) -> None:
    graph, values, scalars = record(activation, warmup=1)
    plan = Planner(COSTS, verify=True).plan(graph)
    assert any(op.late for op in plan.graph.ops)
    kept = Planner(COSTS, verify=True, fuel=0).plan(graph)
    one, other = run_by_plan(plan, values, scalars), replayed(graph, values, scalars)
    assert all(torch.equal(one[v.id], other[v.id]) for v in graph.outputs)
    assert plan.nbytes < kept.nbytes


def test_what_saves_little_is_kept() -> None:
    graph, *_ = record(activation, warmup=1)
    assert again(graph) is graph


def program(change: Callable[[torch.Tensor, torch.Tensor], Any]) -> Callable[[], Any]:
    def run() -> Any:
        torch.manual_seed(0)
        x, w = torch.randn(4, 8, dtype=torch.bfloat16), torch.randn(8, 8, dtype=torch.bfloat16)
        h = x @ w
        a = (h.float() * 2).tanh()
        b = a.exp() + a
        z = b.to(torch.bfloat16) @ w
        return change(h, a), z.float() * a * b

    return run


def test_only_what_is_still_there_unchanged_is_begun_from(small: None) -> None:
    graph, *_ = record(program(lambda h, a: h.sum()), warmup=1)
    assert any(op.late for op in again(graph).ops)
    graph, *_ = record(program(lambda h, a: h.mul_(2).sum()), warmup=1)
    assert again(graph) is graph, "the product is written after"


def test_what_somebody_holds_is_read_where_it_is(small: None) -> None:
    graph, *_ = record(program(lambda h, a: (h.sum(), a)), warmup=1)
    held = {v.storage for v in graph.outputs}
    found = again(graph)
    tanh = [op for op in found.ops if op.target._opname == "tanh"]
    assert len(tanh) == 1 and tanh[0].results[0].storage in held
