"""What a capture has to know of a graph: the same as looking at each op tells, and known before the step that captures."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

import kitsune
from kitsune.ir import Effects, Graph, Kind, Op, Result, Value
from kitsune.ir.tensor_type import default_type
from kitsune.planning import plan_for
from kitsune.runtime import GraphFacts
from kitsune.runtime.capturable import why_not_moving
from kitsune.runtime.places import Places
from kitsune.runtime.replay import most_in_use
from kitsune.scheduler import dead_code
from tests.plan.test_corpus_plans import FILES, graph_of
from tests.runtime.backends import chain
from tests.runtime.checked import executor
from tests.runtime.test_cold_start import cold, idle, step

aten = torch.ops.aten
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


def value(number: int, device: str = "cuda", dtype: torch.dtype = torch.float32, storage: int | None = None) -> Value:
    return Value(number, default_type(dtype, (2, 3), device), number if storage is None else storage)


def op(target: Any, inputs: tuple[Value, ...], *results: Value, kind: Kind = Kind.EXTERN, **more: Any) -> Op:
    return Op(target, kind, inputs, (), inputs, Result(0), results, **more)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name.partition(".")[0])
def test_facts_are_those_that_each_op_tells(path: Any) -> None:
    graph = dead_code(graph_of(path))
    outputs = [v for op in graph.ops for v in op.outputs]
    facts = GraphFacts(graph, outputs[0].type.device)
    used = {v.id for op in graph.ops for v in op.inputs} | {v.id for v in graph.outputs}
    assert facts.inputs == tuple(v.id for v in graph.inputs if v.id in used)
    assert facts.n_values == 1 + max(v.id for v in (*graph.inputs, *outputs))
    assert facts.shared == {v.storage for v in outputs} & {v.storage for v in graph.inputs}
    written = {s for op in graph.ops for s in op.effects.writes}
    assert facts.writers == {s: next(op for op in graph.ops if s in op.effects.writes) for s in written}
    assert facts.refusal is None and len(facts.inputs) > 3 and written


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name.partition(".")[0])
def test_what_is_in_use_at_most_is_what_a_walk_over_the_ops_finds(path: Any) -> None:
    graph = dead_code(graph_of(path))
    kept, given = {v.storage for v in graph.outputs}, {v.storage for v in graph.inputs}
    last = {v.storage: k for k, op in enumerate(graph.ops) for v in (*op.inputs, *op.outputs)}
    held: dict[int, int] = {}
    most = 0
    for k, op_ in enumerate(graph.ops):
        for v in op_.outputs:
            if v.storage not in given and v.storage not in held:
                held[v.storage] = v.type.extent_bytes * (v.type.device.type != "cpu")
        most = max(most, sum(held.values()))
        held = {s: n for s, n in held.items() if s in kept or last[s] > k}
    assert most_in_use(graph) == most and (most > 0) is ("cuda" in path.name)


def test_values_are_found_by_storage_and_by_root() -> None:
    graph = graph_of(next(path for path in FILES if path.name.startswith("resnet18-small-amp-cuda")))
    places = Places(graph)
    values = [*graph.inputs, *(v for op in graph.ops for v in op.outputs)]
    for number in {v.storage for v in values}:
        assert places.by_storage[number] == [v.id for v in values if v.storage == number]
    for root, family in places.family.items():
        assert family == [v.id for v in values if places.root[v.id].id == root]
    assert sum(map(len, places.family.values())) == len(values) > len(places.family)


A, B, C = value(0), value(1), value(2)
HOST = value(3, "cpu")
MASK = value(4, dtype=torch.bool)


def counted(*args: int, **bounds: int) -> Op:
    return Op(aten.histc.default, Kind.EXTERN, (A, *args), tuple(bounds.items()), (A,), Result(0), (B,))


HALVES = [value(n, dtype=torch.bfloat16) for n in (5, 6, 7)]
ENDS = value(8, dtype=torch.int32)


def grouped(*values: Value) -> Graph:
    return Graph((*values[:2], ENDS), (op(aten._grouped_mm.default, (*values[:2], ENDS), values[2]),), (values[2],))


@pytest.mark.parametrize(
    ("graph", "said"),
    [
        (Graph((A,), (op(aten.exp.default, (A,), B),), (B,)), None),
        (Graph((A,), (op(aten.nonzero.default, (A,), B),), (B,)), "aten.nonzero.default at None looks at values on the host."),
        (Graph((A,), (op(aten.histc.default, (A,), B),), (B,)), "aten.histc.default at None looks at values on the host."),
        (Graph((A,), (counted(8, 0, 0),), (B,)), "looks at values on the host."),
        (Graph((A,), (counted(8, 0, 7),), (B,)), None),
        (Graph((A,), (counted(8, min=0, max=7),), (B,)), None),
        (grouped(*HALVES), None),
        (grouped(A, B, C), "aten._grouped_mm.default at None looks at values on the host."),
        (grouped(*HALVES[:2], C), "looks at values on the host."),
        (Graph((A,), (op(aten._linalg_eigh.default, (A,), B),), (B,)), "that does not survive a capture"),
        (Graph((A, MASK), (op(aten.index.Tensor, (A, MASK), B),), (B,)), "counts a mask on the host"),
        (Graph((A, C), (op(aten.index.Tensor, (A, C), B),), (B,)), None),
        (Graph((A,), (op(aten.exp.default, (A,), B), op(aten.zeros.default, (), HOST)), (B,)), "computes on another device"),
        (Graph((A,), (op(aten._flash_attention_forward.default, (A,), B, HOST),), (B,)), None),
        (Graph((A, HOST), (op(aten.add.Tensor, (A, HOST), B),), (B,)), "reads a tensor on the CPU"),
        # Nothing is done with it.
        (Graph((A, HOST), (op(aten.exp.default, (A,), B),), (B,)), None),
        (Graph((A, HOST), (op(aten.exp.default, (A,), B),), (B, HOST)), "reads a tensor on the CPU"),
        (Graph((A,), (op(aten._flash_attention_forward.default, (A,), B, HOST),), (B, HOST)), "leaves a tensor on the CPU"),
    ],
    ids=str,
)
def test_what_cannot_be_captured(graph: Graph, said: str | None) -> None:
    refusal = GraphFacts(graph, CUDA).refusal
    assert refusal is None if said is None else said in (refusal or "")


def test_an_input_that_is_only_returned_is_used() -> None:
    assert GraphFacts(Graph((A, C, MASK), (op(aten.exp.default, (A,), B),), (B, C)), CUDA).inputs == (0, 2)


def test_what_may_move() -> None:
    part = torch.zeros(4, 3)[1:3]
    read = op(aten.exp.default, (A,), B)
    assert why_not_moving(GraphFacts(Graph((A,), (read,), (B,)), CPU), 0, part) is None
    overlapping = torch.as_strided(torch.zeros(6), (2, 3), (1, 1))
    assert "share memory" in str(why_not_moving(GraphFacts(Graph((A,), (read,), (B,)), CPU), 0, overlapping))
    viewed = GraphFacts(Graph((A,), (op(aten.view.default, (A,), value(1, storage=0), kind=Kind.VIEW),), (B,)), CPU)
    assert "views of the memory around it" in str(why_not_moving(viewed, 0, part))
    assert why_not_moving(viewed, 0, part.clone()) is None
    after = Value(5, A.type, 0, 1)
    writes = op(aten.exp_.default, (A,), rewritten=((A, after),), effects=Effects((0,)))
    written = GraphFacts(Graph((A,), (read, writes), (B,)), CPU)
    assert "aten.exp_.default at None writes it" in str(why_not_moving(written, 0, part))


def test_a_step_that_captures_finds_out_nothing_about_its_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[bool] = []
    here = threading.get_ident()
    for kind in (Places, GraphFacts):

        def init(self: Any, *of: Any, real: Any = kind.__init__) -> None:
            made.append(threading.get_ident() == here)
            real(self, *of)

        monkeypatch.setattr(kind, "__init__", init)
    with cold(graphs=True) as (workers, _):
        captured = []
        for _ in range(2):
            assert torch.equal(step(), chain())
            captured.append(kitsune.counters()["captured"])
        # Those of the region as it is run op by op: of the first step.
        assert captured == [0, 1] and made == [True, True]
        made.clear()
        assert idle()
        workers.release()
        assert made == [False, False]
        made.clear()
        # It has no inputs that would stay where they are, and is run by its plan before it is captured.
        for _ in range(2):
            assert torch.equal(step(), chain())
        assert kitsune.counters()["captured"] == 2 and not made


def test_streams_of_a_graph_are_ordered_when_its_plan_is_made_ready() -> None:
    graph = graph_of(next(path for path in FILES if path.name.startswith("bert-small-amp-cuda")))
    for n_streams in (1, 4):
        with kitsune.config.patch(streams=n_streams):
            plan = plan_for(graph, "sm_90")
        several = any(launch.stream for launch in plan.launches)
        assert several is (n_streams > 1) and (executor()[0].prepare(plan).branches is not None) is several
