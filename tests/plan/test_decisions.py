"""Decisions of the planner that no figure of a whole plan shows, each by itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import kitsune
import kitsune.planning
from kitsune.codegen.dtypes import LANGUAGE, MEMORY
from kitsune.codegen.tiles import _turn
from kitsune.fusion import FusionConfig, Rules, in_long_rows, partition, rules
from kitsune.fusion.group import written
from kitsune.fusion.grouping import lies_between
from kitsune.ir import (
    Access,
    Effects,
    Graph,
    Kernel,
    Kind,
    Launch,
    Load,
    Local,
    Op,
    Operand,
    Plan,
    Result,
    Step,
    Store,
    Value,
    default_type,
    happens_before,
    reduction_of,
)
from kitsune.memory import Lifetime, assign_offsets
from kitsune.planning import Planner
from kitsune.scheduler import RATES, Costs, dead_code, in_channels_last, padded_products, parts, split_reductions
from kitsune.scheduler.channels_last import _ChannelsLast, _Parts
from tests.corpus import FILES, load, name_of
from tests.plan.recorded import plan_of, recorded_again
from tests.plan.test_padding import COSTS

aten = torch.ops.aten
F4 = default_type(torch.float32, (4,))
SMALL = [path for path in FILES if name_of(path) in ("bert-small-amp-cpu", "resnet50-small-amp-cpu", "lenet-small-fp32-cpu")]
BASE = torch.linspace(0, 1, 6 * 8 * 40).view(6, 8, 40)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    kitsune.reset()
    yield


def planner(numerics: str = "strict", **fields: Any) -> Planner:
    return Planner(Costs(RATES["sm_90"]), numerics=numerics, **fields)


def kernels(plan: Plan) -> list[Any]:
    return [kernel for launch in plan.launches for kernel in launch.kernels]


def test_an_unsound_plan_is_not_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(plan: Plan) -> None:
        raise ValueError("unsound")

    graph = recorded_again(lambda: BASE * 2)
    monkeypatch.setattr(kitsune.planning, "verify_plan", refuse)
    planner().plan(graph)
    with pytest.raises(ValueError, match="unsound"):
        planner(verify=True).plan(graph)


def test_a_kernel_that_was_measured_too_slow_does_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    (kernel,) = kernels(plan_of(lambda: BASE * 2 + 1))
    monkeypatch.setattr(rules, "MEASURED", {rules.benefit_key(kernel): 1.1})
    asked = {least: Rules(FusionConfig(min_fusion_benefit=least)) for least in (0.0, 1.0, 1.1, 1.2)}
    assert [asked[least].pays(kernel) for least in asked] == [True, True, True, False]
    assert Rules().pays(kernel)
    monkeypatch.setattr(rules, "MEASURED", {})
    assert asked[1.2].pays(kernel)


@pytest.mark.parametrize("path", SMALL, ids=name_of)
def test_every_op_of_a_planned_graph_returns_all_that_it_makes(path: Any) -> None:
    def made(structure: Any) -> list[int]:
        if isinstance(structure, Result):
            return [structure.index]
        return [n for part in structure for n in made(part)] if isinstance(structure, (tuple, list)) else []

    for op in planner().plan(load(path)).graph.ops:
        assert sorted(made(op.structure)) == list(range(len(op.results))), str(op.target)


@pytest.mark.parametrize("path", SMALL, ids=name_of)
def test_nodes_hold_their_ops_in_the_programs_order_and_joining_saves_one_launch(path: Any) -> None:
    saved = set()

    def worth(saved_bytes: int, saved_launches: int) -> bool:
        saved.add(saved_launches)
        return True

    graph = dead_code(load(path))
    found = partition(graph, planner().why_not_fused, worth)
    assert saved == {1}
    assert all(found.nodes[n].numbers == sorted(found.nodes[n].numbers) for n in found.living())
    assert any(len(found.nodes[n].numbers) > 1 for n in found.living())


def test_rows_are_walked_as_what_is_stored_for_each_element_lies() -> None:
    seen = BASE.permute(1, 0, 2)
    (kernel,) = kernels(plan_of(lambda: (seen.sum(-1), seen * 2), numerics="strict"))
    assert kernel.domain == (6, 8, 40) and kernel.reduced == 1


def test_columns_are_walked_as_they_lie() -> None:
    image = torch.ones(64, 3, 5).transpose(0, 2)
    (kernel,) = kernels(plan_of(lambda: (image * 2).sum((0, 2)), numerics="strict"))
    assert kernel.loads[0].strides[-1] == 1 or kernel.loads[0].strides[-2:] == (15, 1)


def test_dimensions_to_reduce_are_taken_in_the_tensors_order() -> None:
    x = Value(0, default_type(torch.float32, (2, 3, 4)), 0)
    y = Value(1, default_type(torch.float32, (2,)), 1)
    op = Op(aten.sum.dim_IntList, Kind.REDUCTION, (x, (2, -2)), (), (x,), Result(0), (y,))
    reduction = reduction_of(op)
    assert reduction is not None and tuple(reduction.dims) == (1, 2)


def test_a_view_of_an_input_that_nobody_reads_is_dead_and_one_that_is_read_is_not() -> None:
    x, seen, y = Value(0, F4, 0), Value(1, F4, 0), Value(2, F4, 1)
    view = Op(aten.view.default, Kind.VIEW, (x, (4,)), (), (x,), Result(0), (seen,))
    reads = Op(aten.neg.default, Kind.POINTWISE, (seen,), (), (seen,), Result(0), (y,))
    assert dead_code(Graph((x,), (view,), ())).ops == ()
    assert dead_code(Graph((x,), (view, reads), (y,))).ops == (view, reads)
    after = replace(y, id=3, version=1)
    pair, effects = ((y, after),), Effects(writes=(1,))
    writes = Op(aten.neg_.default, Kind.POINTWISE, (y,), (), (y,), Operand(0), (), pair, effects)
    assert dead_code(Graph((x,), (view, reads, writes), (after,))).ops == (view, reads, writes)


def test_an_arena_is_made_smaller_as_far_as_halving_finds() -> None:
    """What lies in an arena of 8 KiB is gone when a result of 4 KiB is made: half of it is made elsewhere."""
    ours = [Lifetime(k, 4096, 0, 0b1, True) for k in (1, 2)]
    offsets, arena = assign_offsets([Lifetime(0, 4096, 1, 0b10, False), *ours], happens_before([Launch(), Launch()]))
    assert arena == 4096 and len(offsets) == 1


def test_dtypes_have_tritons_names() -> None:
    names = {
        torch.float64: ("fp64", "tl.float64"),
        torch.float32: ("fp32", "tl.float32"),
        torch.bfloat16: ("bf16", "tl.bfloat16"),
        torch.float16: ("fp16", "tl.float16"),
        torch.int64: ("i64", "tl.int64"),
        torch.int32: ("i32", "tl.int32"),
        torch.int16: ("i16", "tl.int16"),
        torch.int8: ("i8", "tl.int8"),
        torch.uint8: ("u8", "tl.uint8"),
        torch.bool: ("i8", "tl.int1"),
    }
    assert {dtype: (MEMORY[dtype], LANGUAGE[dtype]) for dtype in MEMORY} == names


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_both_types_of_16_bits_are_padded_and_put_into_channels_last(dtype: torch.dtype) -> None:
    rows, odd = torch.ones(64, 16, dtype=dtype), torch.ones(16, 1001, dtype=dtype)
    found = padded_products(dead_code(recorded_again(lambda: (rows @ odd).sum())), COSTS, lambda op: None)
    (product,) = [op for op in found.ops if op.kind is Kind.GEMM]
    assert product.results[0].type.shape == (64, 1008)
    image, weight = torch.ones(2, 8, 6, 6, dtype=dtype), torch.ones(8, 8, 3, 3, dtype=dtype)
    found = in_channels_last(dead_code(recorded_again(lambda: torch.conv2d(image, weight) * 2)), COSTS)
    (convolution,) = [op for op in found.ops if op.target is aten.convolution.default]
    assert convolution.results[0].type.stride[1] == 1


def test_a_triangle_of_an_image_in_channels_last_lies_as_eager_has_it() -> None:
    """Pointwise, but not by torch's iterator over elements."""
    image, weight = torch.ones(2, 8, 6, 6, dtype=torch.bfloat16), torch.ones(8, 8, 1, 1, dtype=torch.bfloat16)
    for name in ("tril", "triu"):
        graph = dead_code(recorded_again(lambda name=name: getattr(torch.conv2d(image, weight), name)() * 2))
        (op,) = [op for op in in_channels_last(graph, COSTS).ops if op.target._opname == name]
        eager = getattr(torch.ones(2, 8, 6, 6).to(memory_format=torch.channels_last), name)()
        assert op.results[0].type.stride == eager.stride()


def test_a_transposed_tensor_is_walked_as_it_lies() -> None:
    turned = torch.ones(6, 8).t()
    (kernel,) = kernels(plan_of(lambda: turned * 2 + 1))
    assert kernel.domain == (48,)


def test_a_sum_over_images_needs_no_copy_of_them() -> None:
    """Of whole channels, as the gradient of a bias is, the result lies alike whatever the images lie like."""
    image, weight = torch.ones(2, 8, 6, 6, dtype=torch.bfloat16), torch.ones(8, 8, 3, 3, dtype=torch.bfloat16)
    graph = in_channels_last(dead_code(recorded_again(lambda: torch.conv2d(image, weight).sum((0, 2, 3)))), COSTS)
    (total,) = [op for op in graph.ops if op.kind is Kind.REDUCTION]
    assert total.inputs[0].type.stride[1] == 1


def test_columns_of_a_turn_are_by_how_many_operands_move_along_rows_and_columns() -> None:
    """Numbers of a row or of a column alone do not count. One operand of few blocks has more at a time."""

    def kernel(n_full: int) -> Kernel:
        value = Value(0, F4, 0)
        full, row, column = (Access(value, walk) for walk in ((1, 0, 64), (1, 0, 0), (0, 0, 1)))
        step = Step(Op(aten.sum.default, Kind.REDUCTION, (), (), (), Result(0), (value,)), ())
        return Kernel("k", (64, 64, 64), (full,) * n_full + (row,) * 4 + (column,) * 4, (step,), (), 2)

    assert [_turn(kernel(n), 1024) for n in (1, 2, 3, 4, 5, 6)] == [16, 32, 16, 16, 16, 32]
    assert [_turn(kernel(n), 477) for n in (1, 2)] == [64, 32]


def test_a_reduction_whose_parts_no_kernel_can_hold_stays_whole() -> None:
    graph = dead_code(recorded_again(lambda: torch.ones(4, 1 << 20).sum(1)))
    recorded = {op.target for op in graph.ops}
    assert len(split_reductions(graph, parts, lambda op: None).ops) > len(graph.ops)
    refused = split_reductions(graph, parts, lambda op: None if op in graph.ops else "its parts are refused")
    assert refused.ops == graph.ops and {op.target for op in refused.ops} == recorded


def test_only_copies_between_calls_of_the_library_count_as_moved() -> None:
    image, weight = torch.ones(2, 8, 6, 6, dtype=torch.bfloat16), torch.ones(8, 8, 3, 3, dtype=torch.bfloat16)

    def copied(program: Any) -> int:
        graph = dead_code(recorded_again(program))
        chosen = {n for n, op in enumerate(graph.ops) if op.target is aten.convolution.default}
        rewriting, parts_of = _ChannelsLast(graph, chosen), _Parts(graph, chosen)
        return sum(rewriting.copied_bytes(rewriting.rewritten(), parts_of).values())

    assert copied(lambda: torch.conv2d(image * 2, weight * 2) * 2) == 0
    assert copied(lambda: torch.conv2d(image, weight * 2) * 2) == 2 * image.nbytes


def adam(p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: Tensor, update: Any = torch._fused_adam_) -> None:
    numbers = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0, "eps": 1e-8, "amsgrad": False, "maximize": False}
    update([p], [g], [m], [v], [], [step], **numbers)


def sgd(p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: Tensor) -> None:
    numbers = {"weight_decay": 0.0, "momentum": 0.9, "lr": 0.1, "dampening": 0.0}
    torch._fused_sgd_([p], [g], [m], **numbers, nesterov=False, maximize=False, is_first_step=False)


@pytest.mark.parametrize("update", [adam, partial(adam, update=torch._fused_adamw_), sgd], ids=["adam", "adamw", "sgd"])
def test_an_update_leaves_its_gradients_as_they_are(update: Any) -> None:
    """It declares that it writes them, which it would where they are to be unscaled."""
    graph = recorded_again(lambda: update(*(torch.ones(8) for _ in range(4)), torch.ones(())))
    (op,) = [op for op in graph.ops if "_fused_" in op.target._opname]
    really = {before.storage for _, before, _ in written(op)}
    assert {op.args[0][0].storage} <= really < set(op.effects.writes)
    assert op.args[1][0].storage not in really


def test_a_plan_counts_ops_that_nobody_needs_and_memory_beside_its_arena() -> None:
    x = torch.ones(64, 64)

    def program() -> Tensor:
        product = x @ x
        (x + 1).exp()
        return product @ x

    plan = plan_of(program)
    assert plan.n_dead == 2
    assert (plan.arena, plan.outside) == (x.nbytes, x.nbytes), "the first product lies in the arena, the second is the program's"


def test_no_way_leads_from_a_node_to_one_that_it_does_not_come_before() -> None:
    # The node that was first has been joined with one that comes after node 1; node 2 comes after nothing.
    nodes: Any = SimpleNamespace(anc=[1 << 1, 0, 0])
    assert not lies_between(nodes, 1, 2)
    nodes.anc[2] = 1 << 1
    assert not lies_between(nodes, 1, 2)
    nodes.anc[2] = 1 << 1 | 1 << 0
    assert lies_between(nodes, 1, 2)


@pytest.mark.parametrize(("walk", "becomes_one"), [((64, 1), True), ((64, 0), True), ((1, 8), False)])
def test_long_rows_are_those_along_which_every_tensor_moves_by_one_or_not_at_all(
    walk: tuple[int, int], becomes_one: bool
) -> None:
    value = Value(0, F4, 0)
    loads = (Access(value, (1, 0)), Access(value, walk))
    step = Step(Op(aten.add.Tensor, Kind.POINTWISE, (), (), (), Result(0), (value,)), (Load(0), Load(1)))
    kernel = Kernel("k", (8, 512), loads, (step,), (Store(Local(0, 0), Access(value, (512, 1))),))
    assert (in_long_rows(kernel) is not None) is becomes_one
