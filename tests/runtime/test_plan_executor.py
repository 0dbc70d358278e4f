"""The plan executor against replay, bit for bit: values, aliases, failures and broken kernels."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings

import kitsune
from kitsune.dispatch import below_autograd
from kitsune.ir import Graph, Kind, Launch, Op, Plan, Result, Value, default_type, storage_of, tensor_type, type_of
from kitsune.runtime.frame import Frame, Layout
from kitsune.runtime.instructions import Instruction, Start
from tests.property import steps, steps_autograd  # noqa: F401  (they fill the table)
from tests.property.strategies import programs
from tests.property.test_programs import SLOW
from tests.property.world import Program
from tests.runtime.checked import FLAVORS, Values, assert_equal, checked, copied, executor, never_written, outcome, record
from tests.runtime.naive import FakeLaunch, plan_of
from tests.runtime.programs import PROGRAMS

aten = torch.ops.aten
F2 = default_type(torch.float32, (2,))
pytestmark = pytest.mark.usefixtures("fresh")


@pytest.mark.parametrize("flavor", FLAVORS, ids=lambda f: "_".join(k for k, on in f.items() if on) or "calls")
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.__name__)
def test_a_plan_computes_what_replay_computes(program: Any, flavor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with checked(monkeypatch, **flavor) as it:
        for _ in range(2):
            with kitsune.accelerate(warmup=0, device="cpu"):
                kept = program()
            del kept
    assert it.prepared
    assert not it.told
    assert not flavor["kernels"] or it.n_kernels
    assert it.executor.pool.statistics.used_bytes == 0


class Broken(FakeLaunch):
    def start(self, *args: Any) -> None:
        raise RuntimeError("no such instruction")


def never(launch: Launch) -> Any:
    error = ValueError("cannot be compiled")
    error.path = "/cache/add_relu.py"  # type: ignore[attr-defined]
    raise error


@pytest.mark.parametrize("start", [Broken, never])
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.__name__)
def test_a_broken_kernel_is_run_op_by_op(program: Any, start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with checked(monkeypatch, start=start, kernels=True, arena=True) as it:
        for _ in range(2):
            with kitsune.accelerate(warmup=0, device="cpu"):
                kept = program()
            del kept
    assert it.told
    assert all(("/cache/add_relu.py" in told) == (start is never) for told in it.told)


def test_a_kernel_that_failed_is_not_tried_again() -> None:
    graph, values, scalars = record(lambda: (torch.ones(3) + 1).exp())
    it, told = executor(Broken)
    prepared = it.prepare(plan_of(graph))
    (start,) = [i for i in prepared.instructions if isinstance(i, Start)]
    kernel: Any = start.prepared
    again = it.prepare(plan_of(graph))
    for each in (prepared, prepared, again):
        got = copied(values)
        it.run(each, got, scalars)
        assert_equal(graph, outcome(graph, values, scalars), got)
    assert (kernel.starts, len(told)) == (0, 1)
    assert "exp cannot be used" in told[0]
    assert "no such instruction" in told[0]


def test_a_result_may_lie_where_a_dying_operand_lies() -> None:
    values = [Value(i, F2, i) for i in range(6)]
    x, a, b, c, d, e = values

    def op(target: Any, inputs: tuple[Value, ...], result: Value) -> Op:
        return Op(target, Kind.POINTWISE, inputs, (), inputs, Result(0), (result,))

    ops = (op(aten.exp.default, (x,), a), op(aten.neg.default, (a,), b), op(aten.sin.default, (a,), c))
    ops += (op(aten.add.Tensor, (b, a), d), op(aten.mul.Tensor, (d, c), e))
    graph = Graph((x,), ops, (e,))
    plan = plan_of(graph, most=1)
    two = plan_of(Graph((x, a), ops[1:], (b, c, d)), most=3).launches
    plan = Plan(graph, (plan.launches[0], two[0], plan.launches[-1]), {1: 0, 2: 0, 3: 512, 4: 1024}, 1536, ((),) * 3)
    for start in (FakeLaunch, Broken):
        got: Values = [torch.tensor([0.5, 1.5]), *[None] * 5]
        it, _ = executor(start)
        expected = outcome(graph, got, [])
        it.run(it.prepare(plan), got, [])
        assert torch.equal(got[5], expected[5])


def test_a_failure_names_the_line_and_spares_what_was_before() -> None:
    table, weight = torch.zeros(3, 2), torch.ones(2, 2)

    def program() -> Any:
        before = table + 1
        row = before[1]
        product = table @ weight
        return before, row, product, before * 2

    graph, values, scalars = record(program)
    (weight_value,) = [v for v in graph.inputs if v.type.shape == (2, 2)]
    values[weight_value.id] = torch.zeros(5, 5)
    for flavor in FLAVORS:
        got = copied(values)
        it, _ = executor()
        with pytest.raises(RuntimeError, match="cannot be multiplied") as caught:
            it.run(it.prepare(plan_of(graph, **flavor)), got, scalars)
        assert f"{__file__}:" in str(caught.value) + "".join(getattr(caught.value, "__notes__", []))
        assert [None if got[v.id] is None else got[v.id].sum().item() for v in graph.outputs] == [6.0, 2.0, None, None]
        assert it.pool.statistics.used_bytes == 0  # type: ignore[attr-defined]


def test_tensors_over_the_arena_are_made_once() -> None:
    graph, values, scalars = record(lambda: ((torch.ones(4, 4) + 1) @ torch.ones(4, 4)).t() @ torch.ones(4, 4))
    it, _ = executor()
    prepared = it.prepare(plan_of(graph))
    for _ in range(2):
        it.run(prepared, copied(values), scalars)
    block = it.pool.take(prepared.plan.arena, torch.device("cpu"), 0)
    (tensors, _), *rest = block.notes.values()
    assert not rest
    assert len(tensors) >= 2
    assert {storage_of(t)._cdata for t in tensors.values()} == {storage_of(block.tensor)._cdata}


def test_memory_that_is_not_in_the_arena_is_let_go_of_early() -> None:
    graph, values, scalars = record(lambda: ((torch.ones(4, 4) + 1) @ torch.ones(4, 4)).exp().sum(0).sin())
    it, _ = executor()
    prepared = it.prepare(plan_of(graph, arena=False, kernels=False))
    alive: list[weakref.ref[torch.Tensor]] = []

    class Look(Instruction):
        def run(self, frame: Any) -> None:
            known = {id(a()) for a in alive}
            alive.extend(weakref.ref(v) for v in frame.values if v is not None and id(v) not in known)
            gc.collect()
            held.append(sum(a() is not None for a in alive))

    held: list[int] = []
    prepared.instructions = tuple(x for i in prepared.instructions for x in (i, Look()))
    # A look is at what the run makes, not at all that the tests before it have left.
    gc.freeze()
    try:
        it.run(prepared, copied(values), scalars)
    finally:
        gc.unfreeze()
    assert len(alive) > 4
    assert max(held) <= 3


def test_memory_that_nobody_has_written_is_not_compared() -> None:
    def program() -> Any:
        x = torch.ones(2)
        return x.new_empty_strided((3,), (1,)), x + 1, torch.empty(2).zero_(), torch.empty(4)[1:]

    graph, _, _ = record(program)
    garbage = never_written(graph)
    written = {str(op.target) for op in graph.ops for v in op.outputs if v.id not in garbage}
    assert {"aten.add.Tensor", "aten.zero_.default"} <= written
    assert len(garbage) == 3 and not any("new_empty" in name or "slice" in name for name in written), graph


@pytest.mark.parametrize("start", [FakeLaunch, Broken])
@settings(SLOW, max_examples=60)
@given(program=programs())
def test_random_programs_run_by_plans(start: Any, program: Program) -> None:
    with pytest.MonkeyPatch.context() as patch, checked(patch, start=start, kernels=True, arena=True) as it:
        for _ in range(2):
            program.run(kitsune.accelerate(warmup=0, device="cpu"))
    assert not it.wrong, it.wrong[0]


TYPES = [
    default_type(torch.bfloat16, (4, 3)),
    tensor_type(torch.float64, torch.Size((2, 3)), (1, 2), 0, torch.device("cpu"), False, False),
    tensor_type(torch.complex64, torch.Size((5,)), (2,), 0, torch.device("cpu"), True, True),
    default_type(torch.bool, ()),
    default_type(torch.float32, (0, 7)),
]


def test_tensors_in_an_arena_lie_where_they_are_said_to_and_count_their_own_writes() -> None:
    # The second block begins in the middle of its memory.
    blocks = [
        SimpleNamespace(tensor=t, address=t.data_ptr(), notes={}) for t in (torch.zeros(4096, dtype=torch.uint8).split(2048))
    ]
    frame = Frame(Layout({}, {}, (), 1, 0), [], [], 0)
    with below_autograd():
        for block in blocks:
            frame.move_in(block)
            for k, type_ in enumerate(TYPES):
                tensor = frame.in_arena(128 * k, type_)
                assert (
                    type_of(tensor).at_start() is type_ and storage_of(tensor).data_ptr() == storage_of(block.tensor).data_ptr()
                )
                assert tensor.data_ptr() == (block.address + 128 * k if type_.nbytes else 0)
    with below_autograd():
        one, other = (frame.in_arena(0, TYPES[0]) for _ in range(2))
    one.fill_(2)
    assert other.tolist() == [[2.0] * 3] * 4 and (one._version, other._version) == (1, 0)
