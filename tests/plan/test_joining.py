"""Parts of joined tensors are written where they end up, where that moves fewer bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import kitsune
from kitsune.ir import Graph, verify
from kitsune.memory import lifetimes
from kitsune.planning import Planner
from kitsune.runtime import takes_memory
from kitsune.scheduler import RATES, Costs, dead_code, joined_in_place
from tests.plan.recorded import launched, recorded_again

# Only bytes count.
COSTS = Costs(replace(RATES["sm_90"], launch_us=0.0))
X, Y = torch.linspace(-1, 1, 24 * 1024).view(6, 4, 1024), torch.linspace(1, 3, 24 * 1024).view(6, 4, 1024)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    kitsune.reset()
    yield


def gradients() -> Any:
    """Three results of the library, joined and put into another order, as the gradients of queries, keys and values are."""
    parts = [X.cumsum(k).transpose(0, 1) for k in range(3)]
    return torch.stack(parts).permute(2, 1, 0, 3).reshape(24, 3072) @ torch.ones(3072, 8)


def kernels() -> Any:
    """Results of kernels of different dtypes, joined."""
    return torch.cat([X * 2, (Y + 1).double(), X.cumsum(1)], -2).sum(1)


def rewritten(program: Callable[[], Any]) -> Graph:
    graph = joined_in_place(dead_code(recorded_again(program)), COSTS, lambda op: None)
    verify(graph)
    return graph


def plans(program: Callable[[], Any]) -> tuple[Any, Any]:
    graph = recorded_again(program)
    return tuple(Planner(COSTS, verify=True, numerics="bitwise", layouts=layouts).plan(graph) for layouts in (False, True))


def test_a_stack_that_is_put_into_another_order_is_copied_once() -> None:
    plain, joined = plans(gradients)
    assert launched(plain).count("stack") == 1 and "stack" not in launched(joined) and "clone" not in launched(joined)
    assert launched(joined).count("copy_") == 3 and joined.nbytes < plain.nbytes


def test_what_a_kernel_makes_is_written_into_the_joined_tensor() -> None:
    plain, joined = plans(kernels)
    assert launched(joined) == ["cumsum", "mul_copy", "add_to_copy_copy", "copy_", "sum"]
    assert "cat" in launched(plain) and joined.nbytes < plain.nbytes


def test_memory_for_others_is_in_use_from_the_first_of_them_on() -> None:
    _, plan = plans(kernels)
    (op,) = [op for op in plan.graph.ops if op.allocates]
    (life,) = [life for life in lifetimes(plan.graph, plan.launches, takes_memory) if life.storage == op.results[0].storage]
    assert life.in_arena and plan.launches[life.first].name == "mul_copy"
    # The request itself starts nothing, and is made just before.
    assert plan.launches[life.first - 1].op is op and plan.launches[life.first - 1].host_only


def written() -> Any:
    joined = torch.cat([X * 2, Y * 2])
    joined.mul_(2)
    return joined.sum(1)


@pytest.mark.parametrize(
    "program",
    [
        lambda: torch.cat([X.cumsum(0), Y.cumsum(0)]).sum(1),
        lambda: torch.cat([X * 2, Y * 2]),
        lambda: torch.stack([X.cumsum(0), Y.cumsum(0)]).permute(1, 0, 2, 3).contiguous(),
        written,
        lambda: [(kept := X * 2), torch.cat([kept, Y.cumsum(0)]).sum(1)],
    ],
    ids=["of the library", "returned", "its copy returned", "written", "a part returned"],
)
def test_what_would_gain_nothing_or_be_seen_stays_as_it_is(program: Callable[[], Any]) -> None:
    assert not any(op.allocates for op in rewritten(program).ops)
