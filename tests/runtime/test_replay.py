"""The replay executor: what it runs, what it leaves out, when it lets go of memory, and how it fails."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import kitsune
from kitsune.ir import Graph, Kind, Op, Result, Site, Slot, Value, default_type, type_of
from kitsune.runtime import Schedule, prepare, replay
from kitsune.runtime.calls import call, call_of
from kitsune.runtime.replay import Instruction, _Tensors

aten = torch.ops.aten
F2 = default_type(torch.float32, (2,))


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    kitsune.reset()
    yield


def chain(n: int) -> Graph:
    """x + 1 + 1 ...; the last value is the output."""
    values = [Value(i, F2, i) for i in range(n + 1)]
    ops = [Op(aten.add.Tensor, Kind.POINTWISE, (a, 1), (), (a,), Result(0), (b,)) for a, b in itertools.pairwise(values)]
    return Graph((values[0],), tuple(ops), (values[-1],))


def test_values_die_after_their_last_use() -> None:
    schedule = prepare(chain(4))
    values = [torch.zeros(2), *[None] * 4]
    replay(schedule, values, [])
    assert [v is None for v in values] == [False, True, True, True, False]
    assert [i.drops for i in schedule.instructions] == [(), (1,), (2,), (3,)]
    assert values[-1].tolist() == [4.0, 4.0]


VIEWS = [
    (aten.expand.default, (2, 3, -1)),
    (aten.permute.default, (1, 0)),
    (aten.select.int, 1, 2),
    (aten.t.default,),
    (aten.transpose.int, 0, -1),
    (aten.unsqueeze.default, -1),
    (aten.view.default, (3, 1, -1)),
]


def of(target: Any, *numbers: Any, kwargs: Any = (), structure: Any = None) -> tuple[Op, list[Any]]:
    """An op on a tensor that begins in the middle of its memory, and has gaps."""
    x = torch.arange(48.0).view(8, 6)[2:5, ::2]
    value, result = Value(0, type_of(x), 0), Value(1, type_of(target(x, *numbers, **dict(kwargs))), 0)
    return Op(target, Kind.VIEW, (value, *numbers), kwargs, (value,), structure or Result(0), (result,)), [x, None]


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view[0].name())
def test_a_method_gives_the_view_that_its_overload_gives(view: Any) -> None:
    op, values = of(*view)
    again, make = [*values], call_of(op)
    assert make is not call
    call(op, values, [])
    make(op, again, [])
    assert type_of(again[1]) is type_of(values[1]) is op.results[0].type
    assert again[1].untyped_storage()._cdata == again[0].untyped_storage()._cdata and torch.equal(again[1], values[1])


def test_a_view_that_fails_has_the_users_line() -> None:
    op, values = of(aten.view.default, (3, 3))
    op = dataclasses.replace(op, site=Site("train.py", 7))
    with pytest.raises(RuntimeError, match="invalid for input of size") as failed:
        call_of(op)(op, [values[0][:2], None], [])
    # Python 3.10 has no notes.
    told = "\n".join((str(failed.value), *getattr(failed.value, "__notes__", ())))
    assert "while running aten.view.default, recorded by Kitsune at train.py:7" in told


def made_by_its_overload(op: Op, values: list[Any], scalars: list[float]) -> None:
    """Whatever makes it, it is as `call` has it."""
    again, copies = [*values], [v.clone() if isinstance(v, torch.Tensor) else v for v in values]
    call(op, copies, scalars)
    call_of(op)(op, again, scalars)
    for one, other in zip(copies, again, strict=True):
        assert one is other is None or (type_of(one) is type_of(other) and torch.equal(one, other))


def test_what_is_told_beforehand_gives_what_its_overload_gives() -> None:
    x, w = torch.arange(32.0).view(1, 2, 4, 4), torch.ones(3, 2, 3, 3)
    values = [Value(k, type_of(t), k) for k, t in enumerate((x, w))]
    made = Value(2, type_of(aten.convolution(x, w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)), 2)
    inside = (*values, None, (1, 1), (1, 1), (1, 1), False, (0, 0), 1)
    conv = Op(aten.convolution.default, Kind.EXTERN, inside, (), tuple(values), Result(0), (made,), grad_enabled=True)
    made_by_its_overload(conv, [x, w, None], [])
    scaled = Op(aten.mul.Tensor, Kind.POINTWISE, (values[0], Slot(1)), (), (values[0],), Result(0), (Value(2, type_of(x), 2),))
    made_by_its_overload(scaled, [x, w, None], [1.0, 2.5])
    cast = Value(2, type_of(x.half()), 2)
    named = (("dtype", torch.float16),)
    to_half = Op(aten._to_copy.default, Kind.POINTWISE, (values[0],), named, (values[0],), Result(0), (cast,))
    made_by_its_overload(to_half, [x, None, None], [])
    found = [Value(k + 2, type_of(t), k + 2) for k, t in enumerate(aten.max_pool2d_with_indices(x, [2, 2]))]
    pair = (Result(0), Result(1))
    pool = Op(aten.max_pool2d_with_indices.default, Kind.EXTERN, (values[0], (2, 2)), (), (values[0],), pair, tuple(found))
    made_by_its_overload(pool, [x, None, None, None], [])
    after = Value(2, type_of(x), 0, 1)
    written = Op(aten.relu_.default, Kind.POINTWISE, (values[0],), (), (values[0],), None, (), ((values[0], after),))
    made_by_its_overload(written, [x - 8, None, None], [])
    assert all(call_of(op) is not call for op in (conv, scaled, pool))


def test_what_takes_a_closer_look_is_left_to_the_way_of_all() -> None:
    plain, _ = of(aten.unsqueeze.default, 0)
    value = plain.args[0]
    listed = dataclasses.replace(plain, args=((value, value),))
    moving = dataclasses.replace(plain, args=(value, (1, Slot(0))))
    named = dataclasses.replace(plain, kwargs=(("out", value),))
    nested, many = (dataclasses.replace(plain, structure=structure) for structure in (([Result(0)],), [Result(0)]))
    writes = dataclasses.replace(plain, target=aten._foreach_neg_.default, rewritten=((value, value),))
    assert all(call_of(op) is call for op in (listed, moving, named, nested, many, writes))


def test_ops_that_ask_for_a_grad_mode_have_theirs() -> None:
    seen: list[bool] = []

    def look(op: Op, values: list[Any], scalars: list[float]) -> None:
        seen.append(torch.is_grad_enabled())

    graph = chain(5)
    modes = (None, True, True, False, None)
    ops = [dataclasses.replace(op, grad_enabled=mode) for op, mode in zip(graph.ops, modes, strict=True)]
    schedule = Schedule(tuple(Instruction(op, (), look) for op in ops), 0)
    for graded in (True, False):
        with torch.set_grad_enabled(graded):
            replay(schedule, [], [])
            assert torch.is_grad_enabled() is graded
    assert seen == [True, True, True, False, False, False, True, True, False, False]


def test_a_view_that_fails_names_its_line() -> None:
    op, _ = of(aten.view.default, (3, 1, -1))
    with pytest.raises(RuntimeError, match="shape") as caught:
        call_of(op)(op, [torch.zeros(5), None], [])
    assert any("recorded by Kitsune" in note for note in caught.value.__notes__)


def detached(outputs: tuple[int, ...], writes: int | None = None) -> tuple[Graph, list[torch.Tensor | None], list[bool]]:
    """y = x + 1 (value 1), two detaches of y (2 and 3), one of these two (4) and one of x (5); `writes` is written then (6)."""
    values = [Value(i, F2, 0 if i in (0, 5) else 1) for i in range(7)]
    x, y, a, b, c, d, after = values
    ops = [Op(aten.add.Tensor, Kind.POINTWISE, (x, 1), (), (x,), Result(0), (y,))]
    ops += [Op(aten.detach.default, Kind.VIEW, (of,), (), (of,), Result(0), (to,)) for of, to in ((y, a), (y, b), (b, c), (x, d))]
    if writes is not None:
        before = values[writes]
        ops.append(Op(aten.neg_.default, Kind.POINTWISE, (before,), (), (before,), None, (), ((before, after),)))
    graph = Graph((x,), tuple(ops), tuple(values[k] for k in outputs))
    schedule, found = prepare(graph), [torch.zeros(2), *[None] * 6]
    replay(schedule, found, [])
    return graph, found, [i.make is None for i in schedule.instructions if i.op.target is aten.detach.default]


@pytest.mark.parametrize(
    ("outputs", "writes", "same"),
    [
        ((1,), None, [True, True, True, True]),
        ((2,), None, [True, True, True, True]),
        # y, a and b are known outside, each as a tensor of its own.
        ((1, 2, 3), None, [False, False, True, True]),
        ((1, 4), None, [True, False, True, True]),
        # What came in is not handed out again.
        ((1, 5), None, [True, True, True, False]),
        # The version after a write is the tensor that was written.
        ((1, 6), 2, [False, True, True, True]),
        ((6,), 4, [True, True, True, True]),
    ],
)
def test_a_detached_tensor_is_the_same_where_nobody_can_tell(
    outputs: tuple[int, ...], writes: int | None, same: list[bool]
) -> None:
    graph, values, found = detached(outputs, writes)
    assert found == same
    there = [values[k] for k in outputs]
    assert len({id(t) for t in (values[0], *there)}) == 1 + len(outputs)
    shared = -1.0 if writes is not None else 1.0
    assert all(
        torch.equal(t, torch.full((2,), shared if v.storage == 1 else 0.0)) for t, v in zip(there, graph.outputs, strict=True)
    )


def test_an_op_that_tells_a_tensor_from_the_same_detached_takes_both() -> None:
    """Of a tensor with gaps it refuses the very one that it writes."""
    index, rows = torch.arange(4), torch.arange(24.0).view(4, 6)
    odd = rows[:, ::2]
    with pytest.raises(RuntimeError, match="refer to a single memory location"):
        odd.index_add_(0, index, odd)
    for _ in range(3):  # at first, the op is made at once
        with kitsune.accelerate(warmup=0, device="cpu"):
            twice = (rows + 0)[:, ::2]
            twice.index_add_(0, index, twice.detach())
        assert torch.equal(twice, odd * 2)


def test_that_holds_for_what_is_detached_twice() -> None:
    x, y, a, b, z = (Value(i, F2, storage) for i, storage in enumerate((0, 1, 1, 1, 2)))
    ops = [Op(aten.add.Tensor, Kind.POINTWISE, (x, 1), (), (x,), Result(0), (y,))]
    ops += [Op(aten.detach.default, Kind.VIEW, (of,), (), (of,), Result(0), (to,)) for of, to in ((y, a), (a, b))]
    ops.append(Op(aten.mul.Tensor, Kind.POINTWISE, (y, b), (), (y, b), Result(0), (z,)))
    assert [i.make is None for i in prepare(Graph((x,), tuple(ops), (z,))).instructions] == [False, False, True, False]


def test_what_is_written_again_and_again_is_known_by_its_first_value() -> None:
    """Not by the one before, which would make 20,000 writes a matter of seconds."""
    values = [Value(i, F2, min(i, 1)) for i in range(100)]
    ops = [Op(aten.add.Tensor, Kind.POINTWISE, (values[0], 1), (), (values[0],), Result(0), (values[1],))]
    for before, after in itertools.pairwise(values[1:]):
        ops.append(Op(aten.neg_.default, Kind.POINTWISE, (before,), (), (before,), None, (), ((before, after),)))
    assert {*_Tensors(Graph((values[0],), tuple(ops), (values[-1],)))._above.values()} == {1}


def test_dead_ops_are_left_out_but_writes_to_inputs_are_not() -> None:
    x = torch.zeros(2)
    with kitsune.accelerate(warmup=0, device="cpu"):
        x.exp()
        x.view(2).add_(1)
    assert kitsune.counters()["skipped"] == 1
    assert x.tolist() == [1.0, 1.0]


def test_a_dead_base_with_a_living_view_is_computed() -> None:
    with kitsune.accelerate(warmup=0, device="cpu"):
        base = torch.ones(2, 2) + 1
        row = base[0]
        base.mul_(3)
        del base
    assert row.tolist() == [6.0, 6.0]


def test_a_dead_random_op_still_draws() -> None:
    torch.manual_seed(0)
    torch.rand(3)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with kitsune.accelerate(warmup=0, device="cpu"):
        torch.rand(3)
        got = torch.rand(3)
    assert torch.equal(got, expected)


def test_a_failure_names_the_line_and_spares_what_was_before() -> None:
    table = torch.zeros(3, 2)
    with pytest.raises(IndexError) as caught, kitsune.accelerate(warmup=1, device="cpu"):
        for index in ([0, 1], [0, 7]):
            before = table + 1
            at = torch.tensor(index)
            found = torch.nn.functional.embedding(at, table)
            after = before * 2
            kitsune.flush()
    text = str(caught.value) + "".join(getattr(caught.value, "__notes__", []))
    assert "index out of range" in text
    assert before.tolist() == [[1.0, 1.0]] * 3
    assert f"{__file__}:" in text
    assert found is not None
    assert after is not None


def test_the_next_step_works_after_a_failure() -> None:
    with kitsune.accelerate(warmup=0, device="cpu"):
        with pytest.raises(RuntimeError, match="p to be in"):
            _ = torch.zeros(4).bernoulli_(2.0).tolist()
        assert (torch.ones(2) + 1).tolist() == [2.0, 2.0]


def test_grad_mode_of_the_recording_is_that_of_the_run() -> None:
    lstm = torch.nn.LSTM(3, 4)
    x = torch.randn(5, 2, 3)
    expected = lstm(x)[0]
    for _ in range(3):
        with kitsune.accelerate(warmup=1, device="cpu"):
            out = lstm(x)[0]
            with torch.no_grad():
                kitsune.flush()
            out.sum().backward()
        assert torch.equal(out, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("warmup", [0, 1])
@pytest.mark.parametrize("fuse", [False, True])
def test_a_list_call_counts_its_writes_once(fuse: bool, warmup: int) -> None:
    """The list kernels of CUDA count by themselves what was counted when the call was recorded."""
    kitsune.reset()
    tensor = torch.zeros((), dtype=torch.int64, device="cuda")
    with kitsune.config.patch(fuse=fuse), kitsune.accelerate(warmup=warmup, device="cuda"):
        for _ in range(3):
            before = tensor._version
            torch._foreach_mul_([tensor.unsqueeze(0), tensor.unsqueeze(0)], 2)
            kitsune.flush()
            assert tensor._version == before + 2
