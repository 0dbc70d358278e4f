"""Matrix products in 16 bits with odd dimensions are made on padded matrices, where it pays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import kitsune
from kitsune.ir import Graph, Kind, Op, verify
from kitsune.memory import lifetimes
from kitsune.planning import Planner
from kitsune.runtime import takes_memory
from kitsune.scheduler import RATES, Costs, dead_code, padded_products
from kitsune.scheduler.padding import padded
from kitsune.scheduler.products import Products
from tests.plan.recorded import launched, recorded_again

aten = torch.ops.aten
ROWS, ODD, HIDDEN = 24, 1001, 16
STATES = torch.linspace(-1, 1, ROWS * HIDDEN).view(ROWS, HIDDEN).to(torch.bfloat16)
WEIGHT = torch.linspace(-2, 2, ODD * HIDDEN).sin().view(ODD, HIDDEN)


class Generous(Costs):
    """Other layouts always pay."""

    __slots__ = ()

    def worth_padding(self, op: Op) -> bool:
        return True

    def padding(self, op: Op, copied_bytes: float, n_operands: int) -> bool:
        return True

    def as_product(self, flops: float, copied_bytes: float) -> bool:
        return True

    def channels_last(self, image_bytes: int, copied_bytes: int) -> bool:
        return True


COSTS = Generous(RATES["sm_90"])


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    kitsune.reset()
    yield


def vocabulary() -> Any:
    """What a language model does with its vocabulary: logits, a loss in float32, both gradients."""
    half = WEIGHT.to(torch.bfloat16)
    logits = STATES @ half.t()
    grad = (logits.view(4, 6, ODD).float().softmax(-1) - 0.001).to(torch.bfloat16).view(ROWS, ODD)
    return (grad.t() @ STATES).float(), grad @ half


def rewritten(program: Callable[[], Any], costs: Costs = COSTS) -> Graph:
    """The graph of a program after the pass."""
    graph = padded_products(dead_code(recorded_again(program)), costs, lambda op: None)
    verify(graph)
    return graph


def products(graph: Graph) -> list[Op]:
    return [op for op in graph.ops if op.kind is Kind.GEMM]


def shapes(op: Op) -> list[tuple[int, ...]]:
    return [tuple(v.type.shape) for v in (*op.inputs, *op.results)]


def test_no_product_of_a_vocabulary_keeps_an_odd_dimension() -> None:
    wide = padded(ODD)
    assert [shapes(op) for op in products(rewritten(vocabulary))] == [
        [(ROWS, HIDDEN), (HIDDEN, wide), (ROWS, wide)],
        [(wide, ROWS), (ROWS, HIDDEN), (wide, HIDDEN)],
        [(ROWS, wide), (wide, HIDDEN), (ROWS, HIDDEN)],
    ]


def test_the_kernels_that_make_the_operands_write_them_into_the_larger_memory() -> None:
    plan = Planner(COSTS, verify=True, numerics="bitwise").plan(recorded_again(vocabulary))
    names = launched(plan)
    assert names == ["to_copy_copy", "zero_", "mm", "to_copy", "_softmax", "sub_to_copy_copy", "zero_", "mm", "to_copy", "mm"]
    graph = plan.graph
    memory = {op.results[0].storage for op in graph.ops if op.allocates}
    lives = {life.storage for life in lifetimes(graph, plan.launches, takes_memory) if life.in_arena}
    assert len(memory) == 2 and memory <= lives
    # The copies themselves are in no memory of their own.
    assert sum(launch.nbytes for launch in plan.launches if launch.name == "to_copy_copy") == ODD * HIDDEN * (4 + 2)


def test_a_reduction_reads_padded_rows_and_writes_them() -> None:
    names = launched(Planner(COSTS, verify=True, numerics="strict").plan(recorded_again(vocabulary)))
    assert "to_copy_softmax_sub_copy" in names and names.count("mm") == 3


def test_what_is_asked_for_is_the_part_that_was_asked_for() -> None:
    plain, padded_graph = dead_code(recorded_again(vocabulary)), rewritten(vocabulary)
    assert [v.type for v in padded_graph.outputs] == [v.type for v in plain.outputs]
    assert {v.id for v in plain.outputs} == {v.id for v in padded_graph.outputs}


def test_a_view_that_is_returned_lies_in_what_was_recorded() -> None:
    """As the weights that autograd saves for a backward behind a read."""

    def program() -> Any:
        half = WEIGHT.to(torch.bfloat16)
        turned = half.t()
        return STATES @ turned, half, turned

    graph = rewritten(program)
    assert shapes(products(graph)[0])[1] == (HIDDEN, padded(ODD))
    made = {v.id: v for op in graph.ops for v in op.outputs}
    half, turned, _ = (made[v.id] for v in graph.outputs)
    assert half.storage == turned.storage and [half.type, turned.type] == [v.type for v in graph.outputs[:2]]


def test_at_their_size_small_products_stay_as_they_are() -> None:
    graph = dead_code(recorded_again(vocabulary))
    assert padded_products(graph, Costs(RATES["sm_90"]), lambda op: None) is graph


def test_a_result_that_is_returned_is_cut_out_by_a_copy() -> None:
    def program() -> Any:
        a, b = (torch.ones(16, n).to(torch.bfloat16) for n in (8, 1001))
        return a.t() @ b

    graph = rewritten(program)
    (product,) = products(graph)
    assert shapes(product)[-1] == (8, padded(1001))
    (copy,) = [op for op in graph.ops if op.target is aten.clone.default]
    assert copy.results == graph.outputs and graph.outputs[0].type.canonical


def test_a_bias_grows_with_its_columns() -> None:
    def program() -> Any:
        x, w, b = torch.ones(16, 32), torch.ones(1001, 32), torch.ones(1001)
        return torch.nn.functional.linear(x.bfloat16(), w.bfloat16(), b.bfloat16()).float() * 2

    (product,) = products(rewritten(program))
    wide = padded(1001)
    assert shapes(product) == [(wide,), (16, 32), (32, wide), (16, wide)]


def test_a_large_dimension_grows_to_whole_cache_lines() -> None:
    assert [padded(n) for n in (3, 1001, 30522, 50257)] == [8, 1008, 30528, 50304]


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (lambda: torch.ones(8, 9) @ torch.ones(9, 8), "it is not in 16 bits"),
        (lambda: torch.ones(8, 16).bfloat16() @ torch.ones(16, 8).bfloat16(), "its dimensions are multiples of 8"),
        (lambda: torch.ones(8, 9).bfloat16()[:, ::3] @ torch.ones(3, 8).bfloat16(), "the library copies its operands"),
        (lambda: torch.ones(8, 18).bfloat16()[:, 9:] @ torch.ones(9, 8).bfloat16(), "an operand is a part of another tensor"),
        (
            lambda: torch.ones(8, 9).bfloat16() @ torch.ones(3, 3, 8).bfloat16().view(9, 8),
            "an operand would need more rows than one of its views has",
        ),
        (lambda: torch.ones(8, 9).bfloat16().add_(1) @ torch.ones(9, 8).bfloat16(), "an operand is written by another operator"),
        (
            lambda: torch.addmm(torch.ones(8, 9).bfloat16(), torch.ones(8, 8).bfloat16(), torch.ones(8, 9).bfloat16()),
            "what it adds is no row of its own",
        ),
        (lambda: torch.bmm(torch.ones(2, 8, 9).bfloat16(), torch.ones(2, 9, 8).bfloat16()), "it is no product of two matrices"),
    ],
)
def test_a_refusal_says_why(program: Callable[[], Any], reason: str) -> None:
    graph = dead_code(recorded_again(program))
    (op,) = products(graph)
    assert Products(graph, lambda op: None).candidate(op) == reason


def test_the_switch_leaves_the_graph_alone() -> None:
    plan = Planner(COSTS, verify=True, layouts=False).plan(recorded_again(vocabulary))
    assert all(op.results[0].type.shape[1] % 8 for op in products(plan.graph)[:1])
