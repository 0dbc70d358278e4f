"""`verify_plan` refuses what is unsound: each rule with the smallest plan that breaks it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

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
    roots,
    tensor_type,
    verify_plan,
)
from kitsune.ir.verify_plan import touches_of
from kitsune.runtime.places import Places

aten = torch.ops.aten
F8 = default_type(torch.float32, (8,))
X, A, B, C = (Value(k, F8, storage=k) for k in range(4))


def call(operand: Value, result: Value, target: Any = aten.neg.default) -> Op:
    return Op(target, Kind.POINTWISE, (operand,), (), (operand,), Result(0), (result,))


def kernel_of(op: Op, stride: int = 1, n: int = 8) -> Kernel:
    (operand,), (result,) = op.inputs, op.results
    store = Store(Local(0, 0), Access(result, (1,)))
    return Kernel("k", (n,), (Access(operand, (stride,)),), (Step(op, (Load(0),)),), (store,))


TO_A, TO_B, TO_C, A_TO_B, B_TO_C = call(X, A), call(X, B), call(X, C), call(A, B), call(B, C)
CHAIN = Graph((X,), (TO_A, A_TO_B, B_TO_C), (C,))
FORK = Graph((X,), (TO_A, TO_B), (A, B))


def plan(graph: Graph, *launches: Launch, **fields: Any) -> Plan:
    return Plan(graph, launches, **{"offsets": {}, "arena": 0, "drops": (), **fields})


def in_turn(graph: Graph, **fields: Any) -> Plan:
    return plan(graph, *(Launch(op=op) for op in graph.ops), **fields)


def launched(*of: tuple[int, tuple[int, ...]]) -> tuple[Launch, ...]:
    """The ops of the chain on streams, with waits."""
    return tuple(Launch(op=op, stream=stream, waits=waits) for op, (stream, waits) in zip(CHAIN.ops, of, strict=True))


SOUND = {
    "one stream": in_turn(CHAIN),
    "two streams": plan(CHAIN, *launched((0, ()), (1, (0,)), (0, (1,)))),
    "a wait of a wait": plan(CHAIN, *launched((0, ()), (1, (0,)), (2, (1,)))),
    "kernels": plan(CHAIN, *(Launch((kernel_of(op),)) for op in CHAIN.ops)),
    "together": plan(FORK, Launch((kernel_of(TO_A), kernel_of(TO_B)))),
    "bytes used again": in_turn(
        Graph((X,), (TO_A, A_TO_B, B_TO_C, call(C, Value(4, F8, 4))), (Value(4, F8, 4),)), offsets={1: 0, 3: 0}, arena=32
    ),
    "dropped after its last use": in_turn(CHAIN, drops=((), (1,), (2,))),
}


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_plan_passes(name: str) -> None:
    verify_plan(SOUND[name])


SMALLER = tensor_type(torch.float32, torch.Size((4,)), (2,), 0, torch.device("cpu"))
WRITE = Op(
    aten.add_.Tensor, Kind.POINTWISE, (X, A), (), (X, A), None, (), ((X, replace(X, id=9, version=1)),), Effects(writes=(0,))
)
READ_AND_WRITE = Graph((X, A), (TO_B, WRITE), (B, replace(X, id=9, version=1)))


def written(op: Op, value: Value, strides: tuple[int, ...]) -> Kernel:
    """The write in place, as a kernel that loads `value` and stores X."""
    loads = (Access(value, strides), Access(A, (1,)))
    return Kernel("k", (8,), loads, (Step(op, (Load(0), Load(1))),), (Store(Local(0, 0), Access(X, (1,))),))


SHIFTED = Value(7, tensor_type(torch.float32, torch.Size((8,)), (1,), 4, torch.device("cpu")), storage=0)
UNSOUND = {
    "launch 1 .neg. may start before aten.neg.default has run": plan(CHAIN, *launched((0, ()), (1, ()), (0, (1,)))),
    "launch 2 .neg. may start before aten.neg.default has run": plan(CHAIN, *launched((0, ()), (1, (0,)), (0, ()))),
    "launch 0 .neg. may start before": plan(CHAIN, Launch(op=A_TO_B), Launch(op=TO_A), Launch(op=B_TO_C)),
    "has two kernels of which one needs the other": plan(
        replace(CHAIN, ops=(TO_A, A_TO_B)), Launch((kernel_of(TO_A), kernel_of(A_TO_B)))
    ),
    "may start before aten.neg.default has run": plan(READ_AND_WRITE, Launch(op=TO_B), Launch(op=WRITE, stream=1)),
    "waits for launch 1, which no event before it ends": plan(CHAIN, *launched((0, (1,)), (1, ()), (0, (1,)))),
    "waits for launch 0, which no event before it ends": plan(CHAIN, *launched((0, (0,)), (1, ()), (0, (1,)))),
    "waits for launch -1, which no event before it ends": plan(CHAIN, *launched((0, (-1,)), (1, ()), (0, (1,)))),
    "is on stream -1": plan(CHAIN, *launched((-1, ()), (0, (0,)), (0, ()))),
    "computes its operators out of order": plan(
        FORK, Launch((replace(kernel_of(TO_A), steps=(Step(TO_B, (Load(0),)), Step(TO_A, (Load(0),)))),))
    ),
    "aten.neg.default is launched twice": plan(FORK, Launch(op=TO_A), Launch(op=TO_B), Launch(op=TO_A)),
    "aten.neg.default is never launched": plan(FORK, Launch(op=TO_A)),
    "launches 0 .k. and 1 .k. are not ordered, and touch storage 1": plan(
        FORK, Launch((kernel_of(TO_A),)), Launch((replace(kernel_of(TO_B), loads=(Access(A, (1,)),)),), stream=1)
    ),
    "launches 0 .k. and 1 .neg. are not ordered, and touch storage 0": plan(
        FORK,
        Launch((replace(kernel_of(TO_A), stores=(Store(Local(0, 0), Access(X, (1,))),)),)),
        Launch(op=TO_B, stream=1),
    ),
    "reaches over 60 bytes of .0, which has 32": plan(FORK, Launch((kernel_of(TO_A, stride=2),)), Launch(op=TO_B)),
    "reaches over 28 bytes of .0, which has 32": plan(FORK, Launch((kernel_of(TO_A, n=7),)), Launch(op=TO_B)),
    "has two kernels that write .1": plan(
        FORK, Launch((kernel_of(TO_A), replace(kernel_of(TO_B), stores=kernel_of(TO_A).stores)))
    ),
    "two kernels of which one reads .1, which the other writes": plan(
        FORK, Launch((kernel_of(TO_A), replace(kernel_of(TO_B), loads=(Access(A, (1,)),))))
    ),
    "stores .0 while other elements of it are in use": plan(
        Graph((X, A), (WRITE,), ()), Launch((written(WRITE, SHIFTED, (1,)),))
    ),
    "storages 1 and 2 share bytes while both are in use": in_turn(CHAIN, offsets={1: 0, 2: 28}, arena=64),
    "storage 1 lies outside of the arena": in_turn(CHAIN, offsets={1: 33}, arena=64),
    "storage 2 lies outside of the arena": in_turn(CHAIN, offsets={2: -4}, arena=64),
    "storage 3 lies in the arena, and others hold it": in_turn(CHAIN, offsets={3: 0}, arena=32),
    "storage 1 is let go of by launch 0 and used after it": in_turn(CHAIN, drops=((1,), (), ())),
    "storage 1 is let go of by launch 2, and not its to": in_turn(CHAIN, drops=((), (1,), (1,))),
    "storage 3 is let go of by launch 2, and not its to": in_turn(CHAIN, drops=((), (), (3,))),
    "storage 0 is let go of by launch 2, and not its to": in_turn(CHAIN, drops=((), (), (0,))),
    "storage 1 is let go of by launch 1, and not its to": in_turn(CHAIN, drops=((), (1,), ()), offsets={1: 0}, arena=32),
}


@pytest.mark.parametrize("says", UNSOUND)
def test_an_unsound_plan_is_named(says: str) -> None:
    with pytest.raises(ValueError, match=says):
        verify_plan(UNSOUND[says])


def test_a_call_of_the_library_writes_what_it_changes_in_place() -> None:
    touches = touches_of(plan(READ_AND_WRITE, Launch(op=TO_B), Launch(op=WRITE)))
    assert touches[0] == [(0, 0, False), (1, 0, False), (1, 0, True)]
    assert touches[1] == [(1, 0, False)] and touches[2] == [(0, 0, True)]


def test_values_of_other_units_have_roots_of_their_own() -> None:
    views = Op(aten.view.dtype, Kind.VIEW, (A, torch.int32), (), (A,), Result(0), (replace(B, storage=1),))
    as_int = replace(views, results=(replace(B, storage=1, type=default_type(torch.int32, (8,))),))
    conjugate = replace(views, results=(replace(B, storage=1, type=replace_type(F8, conj=True)),))
    for op, own in ((views, False), (as_int, True), (conjugate, True)):
        found = roots(Graph((X,), (TO_A, op), op.results))
        assert (found[B.id] is op.results[0]) is own, op
        assert found[A.id] is A


def test_a_view_that_a_planner_has_derived_has_the_root_of_its_operand() -> None:
    def view(of: Value, number: int, offset: int, derived: bool) -> Op:
        seen = Value(number, replace_type(F8, shape=torch.Size((2, 2)), stride=(2, 1), offset=offset), X.storage)
        return Op(aten.as_strided.default, Kind.VIEW, (of,), (), (of,), Result(0), (seen,), derived=derived)

    recorded, derived = view(X, 10, 0, False), view(X, 11, 4, True)
    behind = [view(recorded.results[0], 12, 4, True), view(derived.results[0], 13, 4, False)]
    again = view(derived.results[0], 14, 6, True)
    # As it is once somebody has written it.
    written = [(of.results[0], replace(of.results[0], id=n)) for n, of in ((15, recorded), (16, derived))]
    writes = [Op(aten.zero_.default, Kind.POINTWISE, (a,), (), (a,), Operand(0), (), ((a, b),)) for a, b in written]
    of_written = view(written[1][1], 17, 6, True)
    ops = (recorded, derived, *behind, again, *writes, of_written)
    graph = Graph((X,), ops, tuple(value for op in ops for value in op.outputs))
    found, places = roots(graph), Places(graph)
    assert found[11] is found[14] is found[16] is found[17] is X
    assert found[10] is found[12] is found[13] is found[15] is not X
    where = [places.place(value)[1:] for value in graph.outputs]
    recorded_ones = [(True, 0), (False, 16), (True, 16), (True, 16)]
    assert where == [*recorded_ones, (False, 24), (True, 0), (False, 16), (False, 24)]


def replace_type(type_: Any, **changes: Any) -> Any:
    fields = {name: getattr(type_, name) for name in ("dtype", "shape", "stride", "offset", "device", "conj", "neg")}
    return tensor_type(**{**fields, **changes})


def test_bytes_are_used_again_only_after_an_event() -> None:
    last = call(C, Value(4, F8, 4))
    graph = Graph((X,), (TO_A, TO_C, A_TO_B, last), (B, Value(4, F8, 4)))
    streams = [(0, ()), (1, ()), (0, ()), (1, ())]

    def on(waits: dict[int, tuple[int, ...]]) -> Plan:
        launches = [
            Launch(op=op, stream=s, waits=waits.get(k, w)) for k, (op, (s, w)) in enumerate(zip(graph.ops, streams, strict=True))
        ]
        return plan(graph, *launches, offsets={1: 0, 3: 0}, arena=32)

    with pytest.raises(ValueError, match="storages 1 and 3 share bytes"):
        verify_plan(on({}))
    with pytest.raises(ValueError, match="storages 1 and 3 share bytes"):
        verify_plan(on({1: (0,)}))
    in_turn = (0, 2, 1, 3)
    launches = [Launch(op=graph.ops[n], stream=streams[n][0], waits=(1,) if n == 1 else ()) for n in in_turn]
    verify_plan(plan(graph, *launches, offsets={1: 0, 3: 0}, arena=32))
