"""The two parts of a step that reads its loss before it goes backward, planned as one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import kitsune
from kitsune.ir import Graph, Kind, Op, Plan, Value, n_values, verify
from kitsune.planning import Planner
from kitsune.scheduler import RATES, Costs, Pair, Restoring
from kitsune.scheduler.pairs import prepared, why_not_one
from tests.plan.recorded import launched, recorded_again
from tests.plan.test_channels_last import Block, ImagesOnly, step
from tests.plan.test_corpus_plans import FILES, STRICT, RandomCosts, graph_of

# Of each recorded step that is cut behind its loss: launches of both parts, megabytes that they must move, and how many more that
# would be if each part were planned by itself; then mebibytes of what the first part leaves.
PAIRS = {
    "bert-full-amp-cuda": (159, 250, 16945, 1935, 1874),
    "gpt2-full-amp-cuda": (130, 185, 29562, 13692, 3805),
    "resnet50-full-amp-cuda": (213, 214, 22324, 10690, 2719),
    "vit-full-amp-cuda": (105, 213, 31598, 59, 4217),
}
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
    )


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
    planner = Planner(RandomCosts(seed), verify=True, numerics=numerics)
    assert all(planner.plan(part).n_launches for part in (pair.first, pair.second))
    first, second = planned(planner, pair)
    there = {v.id: v for v in (*first.graph.inputs, *first.graph.outputs)} | {v.id: v for v in pair.second.inputs}
    assert all(v.id in there for v in second.graph.inputs)
    assert second.graph.outputs == pair.second.outputs
    # What the program sees is as it was recorded, and what is kept can be had.
    left = {v.id: v for v in first.graph.outputs}
    assert all(left[v.id] is v for v in pair.first.outputs if v.id not in pair.kept)
    assert not Restoring(pair, first.graph).missing


def test_no_image_is_copied_at_the_cut() -> None:
    graph, costs = recorded_again(step(Block(), 4, 3, 8, 8)), ImagesOnly(RATES["sm_90"])
    planner = Planner(costs, verify=True, numerics="bitwise")
    pair = pair_of(graph)
    apart = [planner.plan(part) for part in (pair.first, pair.second)]
    plans = planned(planner, pair)
    assert [launched(plan).count("clone") for plan in apart] != [0, 0]
    assert [launched(plan).count("clone") for plan in plans] == [0, 0]
    moved, by_itself = (sum(plan.nbytes for plan in both) for both in (plans, apart))
    assert moved <= planner.plan(graph).nbytes < by_itself


def test_what_cannot_be_made_again_is_handed_over_as_well() -> None:
    """A dropout's mask is drawn once, and statistics are written by the call that returns them."""
    pair = pair_of(recorded_again(step(Block(lambda x: torch.dropout(x.mean((2, 3)), 0.5, True)), 4, 3, 8, 8)))
    first, _ = planned(H200, pair)
    restoring = Restoring(pair, first.graph)
    assert any(op.effects.random for op in pair.first.ops) and not any(op.effects.random for op in restoring.ops)
    assert not any(op.effects.writes for op in restoring.ops) and not restoring.missing


def _renumbered(value: Value, by: int) -> Value:
    return dataclasses.replace(value, id=value.id + by)


def test_parts_that_cannot_be_one() -> None:
    pair = pair_of(recorded_again(step(Block(), 4, 3, 8, 8)))
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
    pair = pair_of(recorded_again(step(Block(), 4, 3, 8, 8)))

    def mixed(graph: Graph) -> Graph:
        # What needs nothing of the first part comes before all of it.
        (early,) = [op for op in pair.second.ops if op.target._opname == "ones_like"]
        op = dataclasses.replace(early, args=(graph.inputs[0],), inputs=(graph.inputs[0],))
        return dataclasses.replace(graph, ops=(op, *[o for o in graph.ops if o is not early]))

    assert prepared(pair, lambda graph: graph) is not None
    assert prepared(pair, mixed) is None


def test_halves_are_graphs_of_their_own() -> None:
    pair = pair_of(recorded_again(step(Block(), 4, 3, 8, 8)))
    halves = prepared(pair, lambda graph: graph)
    assert halves is not None
    for half in halves:
        verify(half)
    assert max(map(n_values, halves)) == max(n_values(pair.first), n_values(pair.second))
