"""Regions whose inside has other layouts than eager's leave what eager leaves, in eager's layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st

from kitsune.ir import Graph
from kitsune.planning import Planner
from kitsune.scheduler import dead_code, padded_products
from tests.plan.test_padding import COSTS, vocabulary
from tests.property.test_programs import SLOW
from tests.runtime.checked import record
from tests.runtime.in_double import assert_as_good, in_double, replayed, run_by_plan
from tests.runtime.test_plan_executor import Broken
from tests.runtime.test_real_plans import Walk

Program = Callable[[], Any]


def assert_as_eager(program: Program, rewrite: Callable[[Graph], Graph]) -> Graph:
    """Op by op, by kernels, and with kernels that fail; returns the graph that was run."""
    graph, values, scalars = record(program, warmup=1)
    exact, eager = in_double(graph, values, scalars), replayed(graph, values, scalars)
    other = rewrite(dead_code(graph))
    assert_as_good(graph, exact, eager, replayed(other, values, scalars))
    plan = Planner(COSTS, verify=True).plan(graph)
    for start in (Walk, Broken):
        assert_as_good(graph, exact, eager, run_by_plan(plan, values, scalars, start))
    return other


def padding(graph: Graph) -> Graph:
    return padded_products(graph, COSTS, lambda op: None)


def layer(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, grad: torch.Tensor) -> list[torch.Tensor]:
    """A linear layer, a function after it, and its gradients, at whatever sizes."""
    y = torch.nn.functional.linear(x, w, b)
    grad = grad * (y > 0)
    return [y.float().relu().sum(1), grad @ w, (grad.t() @ x).float(), grad.sum(0)]


@settings(SLOW, max_examples=60)
@given(
    sizes=st.tuples(*[st.sampled_from((1, 3, 8, 9, 16, 33))] * 3),
    dtype=st.sampled_from((torch.bfloat16, torch.float16)),
    bias=st.booleans(),
    keep=st.booleans(),
    seed=st.integers(0, 9),
)
def test_layers_of_any_size(sizes: tuple[int, int, int], dtype: torch.dtype, bias: bool, keep: bool, seed: int) -> None:
    m, n, k = sizes
    generator = torch.Generator().manual_seed(seed)
    x, w, b, grad = (torch.randn(*shape, generator=generator) for shape in ((m, k), (n, k), (n,), (m, n)))

    def program() -> Any:
        half = [t.to(dtype) for t in (x, w, b, grad)]
        found = layer(half[0], half[1], half[2] if bias else None, half[3])
        return (found, half[1]) if keep else found

    other = assert_as_eager(program, padding)
    assert any(op.allocates for op in other.ops) or all(size % 8 == 0 or size == 1 for size in sizes[1:])


@pytest.mark.parametrize("program", [vocabulary])
def test_programs(program: Program) -> None:
    assert any(op.allocates for op in assert_as_eager(program, padding).ops)
