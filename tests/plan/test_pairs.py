"""The two parts of a step that reads its loss before it goes backward, planned as one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import kitsune
from kitsune.ir import Graph, Kind, Op, Plan, Value, n_values, verify
from kitsune.planning import Planner
from kitsune.scheduler import RATES, Costs, Pair, Restoring, fleeting
from kitsune.scheduler.pairs import prepared, why_not_one
from tests.plan.recorded import launched, recorded_again
from tests.plan.test_channels_last import Block, ImagesOnly, step
from tests.plan.test_corpus_plans import FILES, STRICT, RandomCosts, graph_of

# Of each recorded step that is cut behind its loss: launches of both parts, megabytes that they must move, and how many more that
# would be if each part were planned by itself; then mebibytes of what the first part leaves.
PAIRS = {
    "bert-full-amp-cuda": (159, 250, 16945, 1935, 1874),
    "gpt2-full-amp-cuda": (130, 185, 29562, 13692, 3805),
    "resnet50-full-amp-cuda": (213, 214, 22343, 10671, 2738),
    "vit-full-amp-cuda": (105, 213, 31617, 40, 4235),
}
BATCH = (4, 3, 8, 8)
H200 = Planner(Costs(RATES["sm_90"]), verify=True, numerics="strict")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    kitsune.reset()
    yield


def pair_of(graph: Graph) -> Pair:
    """A step's parts before its backward and from there on. Only the second sees what it reads and the step does not return."""
    begin = next(n for n, op in enumerate(graph.ops) if op.target._opname == "ones_like")
    first, second = graph.ops[:begin], graph.ops[begin:]
    made = {v.id: v for op in first for v in op.outputs}
    inside = {v.id for op in second for v in op.outputs}
    read = {v.id: v for op in second for v in op.inputs if v.id not in inside}
    (loss,) = second[0].inputs
    seen = {v.id: v for v in (*graph.outputs, loss) if v.id in made}
    kept = {n: v for n, v in read.items() if n in made}
    used = {v.id for op in first for v in op.inputs}
    return Pair(
        Graph(tuple(v for v in graph.inputs if v.id in used), first, tuple((kept | seen).values()), (loss.id,)),
        frozenset(kept.keys() - seen.keys()),
        Graph(tuple(read.values()), second, tuple(v for v in graph.outputs if v.id not in made)),
        frozenset(v.storage for v in graph.inputs if v.type.dtype is torch.float32 and not _are_images(v)),
    )


class Repeating(RandomCosts):
    """Mostly has values made again."""

    __slots__ = ()

    def making_again(self, saved_bytes: int, read_bytes: int) -> bool:
        return self.die.random() < 0.9


def _are_images(value: Value) -> bool:
    return len(value.type.shape) == 4 and value.type.shape[-1] > 7


def planned(planner: Planner, pair: Pair) -> tuple[Plan, Plan]:
    plans = planner.plan_pair(pair)
    assert plans is not None, why_not_one(pair)
    return plans


def megabytes(*plans: Plan) -> int:
    return round(sum(plan.nbytes for plan in plans) / 1e6)


@pytest.mark.parametrize("name", PAIRS)
def test_both_parts_move_no_more_than_the_whole_would(name: str) -> None:
    path = next(path for path in FILES if path.name.startswith(name))
    pair = pair_of(graph_of(path))
    first, second = planned(H200, pair)
    apart = [H200.plan(part) for part in (pair.first, pair.second)]
    more = megabytes(*apart) - megabytes(first, second)
    assert (first.n_launches, second.n_launches, megabytes(first, second), more, first.outside >> 20) == PAIRS[name]
    assert megabytes(first, second) <= 1.001 * STRICT[name][-1]
    assert apart[0].awaited == first.awaited == pair.first.awaited


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name.partition(".")[0])
@pytest.mark.parametrize(("seed", "numerics"), [(1, "bitwise"), (2, "strict"), (3, "fast")])
def test_plans_are_sound_whatever_the_costs(path: Path, seed: int, numerics: str) -> None:
    pair = pair_of(graph_of(path))
    planner = Planner(Repeating(seed), verify=True, numerics=numerics)
    assert all(planner.plan(part).n_launches for part in (pair.first, pair.second))
    first, second = planned(planner, pair)
    there = {v.id: v for v in (*first.graph.inputs, *first.graph.outputs)} | {v.id: v for v in pair.second.inputs}
    assert all(v.id in there for v in second.graph.inputs)
    assert second.graph.outputs == pair.second.outputs
    # What the program sees is as it was recorded, and what is kept can be had.
    left = {v.id: v for v in first.graph.outputs}
    assert all(left[v.id] is v for v in pair.first.outputs if v.id not in pair.kept)
    restoring = Restoring(pair, first.graph)
    assert not restoring.missing
    # The batch may be another one by then.
    again = {v.storage for v in (*second.graph.inputs, *restoring.given.values())}
    assert again.isdisjoint(fleeting(pair))


def test_no_image_is_copied_at_the_cut() -> None:
    graph, costs = recorded_again(step(Block(), *BATCH)), ImagesOnly(RATES["sm_90"])
    planner = Planner(costs, verify=True, numerics="bitwise")
    pair = pair_of(graph)
    apart = [planner.plan(part) for part in (pair.first, pair.second)]
    plans = planned(planner, pair)
    assert [launched(plan).count("clone") for plan in apart] != [0, 0]
    assert [launched(plan).count("clone") for plan in plans] == [0, 0]
    moved, by_itself = (sum(plan.nbytes for plan in both) for both in (plans, apart))
    # Beside what the whole moves: the batch in 16 bits, written and read again in the layout in which it was recorded.
    assert moved <= planner.plan(graph).nbytes + 2 * 2 * math.prod(BATCH) < by_itself


def test_what_cannot_be_made_again_is_handed_over_as_well() -> None:
    """A dropout's mask is drawn once, and statistics are written by the call that returns them."""
    pair = pair_of(recorded_again(step(Block(lambda x: torch.dropout(x.mean((2, 3)), 0.5, True)), *BATCH)))
    first, _ = planned(H200, pair)
    restoring = Restoring(pair, first.graph)
    assert any(op.effects.random for op in pair.first.ops) and not any(op.effects.random for op in restoring.ops)
    assert not any(op.effects.writes for op in restoring.ops) and not restoring.missing


@pytest.mark.parametrize("name", ["gpt2-small-amp-cuda", "resnet18-small-amp-cpu"])
def test_what_is_done_once_is_not_done_again(name: str) -> None:
    """Dropout, and a norm that keeps statistics: of a part that hands over nothing."""
    pair = pair_of(graph_of(next(path for path in FILES if path.name.startswith(name))))
    everything = frozenset(v.storage for v in pair.first.inputs)
    restoring = Restoring(dataclasses.replace(pair, parameters=everything), dataclasses.replace(pair.first, outputs=()))
    once = {v.id for op in pair.first.ops if op.effects.random or op.effects.writes for v in op.outputs}
    assert len(once & pair.kept) > 2 and once & pair.kept <= restoring.missing
    assert restoring.ops and not any(op.effects.random or op.effects.writes for op in restoring.ops)


def test_what_was_written_since_is_not_known_to_be_what_it_was() -> None:
    def program() -> Any:
        y = torch.ones(4) * 2
        seen = y.view(2, 2)
        y.mul_(3)
        return seen, y.sum()

    graph = recorded_again(program)
    (seen,) = [v for v in graph.outputs if tuple(v.type.shape) == (2, 2)]
    second = Graph((seen,), (), (seen,))
    assert Restoring(Pair(graph, frozenset({seen.id}), second), graph).missing == {seen.id}


def test_what_is_handed_over_as_something_else_is_not_what_was_kept() -> None:
    pair = pair_of(recorded_again(step(Block(), *BATCH)))
    everything = frozenset(v.storage for v in pair.first.inputs)
    pure = [op for op in pair.first.ops if op.kind is Kind.POINTWISE and not (op.effects.random or op.effects.writes)]
    (kept, *_) = [v for op in pure for v in op.outputs if v.id in pair.kept]
    for type_, is_it in ((kept.type, True), (dataclasses.replace(kept.type, dtype=torch.float64), False)):
        first = dataclasses.replace(pair.first, outputs=(dataclasses.replace(kept, type=type_),))
        assert (kept.id in Restoring(dataclasses.replace(pair, parameters=everything), first).given) == is_it


def test_a_batch_is_not_read_behind_the_cut_unless_it_was_saved() -> None:
    """The program may have filled it again by then. Where that is no matter, it is cheaper than what follows from it."""
    x, scale, weight = torch.randn(64, 32), torch.randn(32, requires_grad=True), torch.randn(32, 8, requires_grad=True)

    def program() -> Any:
        loss = (((x * 3).sin() * scale) @ weight).square().mean()
        return loss.detach(), torch.autograd.grad(loss, [scale, weight])

    pair = pair_of(recorded_again(program))
    (batch,) = [v for v in pair.first.inputs if tuple(v.type.shape) == tuple(x.shape)]
    for parameters in (pair.parameters, pair.parameters - {batch.storage}):
        changed = dataclasses.replace(pair, parameters=parameters)
        _, second = planned(Planner(Repeating(1), verify=True, numerics="bitwise"), changed)
        assert (batch.id in {v.id for v in second.graph.inputs}) == (batch.storage in parameters)
        assert fleeting(changed) == {batch.storage} - parameters


def test_parts_that_cannot_be_one() -> None:
    pair = pair_of(recorded_again(step(Block(), *BATCH)))
    assert why_not_one(pair) is None
    foreseen = dataclasses.replace(pair.first, ops=(*pair.first.ops, pair.second.ops[0]))
    assert why_not_one(Pair(foreseen, pair.kept, pair.second)) == "the first part was run with what was expected to follow it"
    kept = next(v for v in pair.first.outputs if v.id in pair.kept)
    after = Value(10**6, kept.type, kept.storage, kept.version + 1)
    zero = torch.ops.aten.zero_.default
    write = Op(
        zero,
        Kind.POINTWISE,
        (kept,),
        (),
        (kept,),
        None,
        (),
        ((kept, after),),
        dataclasses.replace(pair.second.ops[0].effects, writes=(kept.storage,)),
    )
    written = dataclasses.replace(pair.second, ops=(*pair.second.ops, write))
    assert why_not_one(Pair(pair.first, pair.kept, written)) == "the second part writes what the first has made or written"
    between = dataclasses.replace(pair.second, inputs=(*pair.second.inputs, after))
    assert why_not_one(Pair(pair.first, pair.kept, between)) == "what the first part has made was written before the second"
    assert all(H200.plan_pair(Pair(pair.first, pair.kept, second)) is None for second in (written, between))


def test_parts_that_passes_have_mixed_stay_apart() -> None:
    pair = pair_of(recorded_again(step(Block(), *BATCH)))

    def mixed(graph: Graph) -> Graph:
        # What needs nothing of the first part comes before all of it.
        (early,) = [op for op in pair.second.ops if op.target._opname == "ones_like"]
        op = dataclasses.replace(early, args=(graph.inputs[0],), inputs=(graph.inputs[0],))
        return dataclasses.replace(graph, ops=(op, *[o for o in graph.ops if o is not early]))

    assert prepared(pair, lambda graph: graph) is not None
    assert prepared(pair, mixed) is None


def test_parts_that_passes_have_left_incomplete_stay_apart() -> None:
    """What the second part would read need not be there any more, and nobody would make what it returns."""
    pair = pair_of(recorded_again(step(Block(), *BATCH)))
    batch = next(v for v in pair.first.inputs if v.storage in fleeting(pair))

    def reads_the_batch(graph: Graph) -> Graph:
        (late,) = [op for op in pair.second.ops if op.target._opname == "ones_like"]
        now = dataclasses.replace(late, args=(batch,), inputs=(batch,))
        return dataclasses.replace(graph, ops=tuple(now if op is late else op for op in graph.ops))

    def makes_less(graph: Graph) -> Graph:
        made = {v.id for v in pair.second.outputs}
        last = [op for op in graph.ops if any(v.id in made for v in op.outputs)][-1]
        return dataclasses.replace(graph, ops=tuple(op for op in graph.ops if op is not last))

    assert [prepared(pair, change) for change in (reads_the_batch, makes_less)] == [None, None]


def test_halves_are_graphs_of_their_own() -> None:
    pair = pair_of(recorded_again(step(Block(), *BATCH)))
    halves = prepared(pair, lambda graph: graph)
    assert halves is not None
    for half in halves:
        verify(half)
    assert max(map(n_values, halves)) == max(n_values(pair.first), n_values(pair.second))
