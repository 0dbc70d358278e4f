"""What is recorded: graphs of small programs, with their views, writes and outputs, as text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import kitsune
from kitsune.ir import Graph, Kind, Operand, OutputSpec, Result, describe_result, type_of
from kitsune.lazy import Recorder
from tests.plan.recorded import record


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    kitsune.reset()
    yield


def lines(graph: Graph) -> list[str]:
    return str(graph).splitlines()


def test_a_write_makes_a_new_value_on_the_same_storage() -> None:
    x = torch.zeros(2)
    graph = record(lambda: (x + 1).add_(2.0).mul_(x))
    assert lines(graph) == [
        "$0: f32[2] = input",
        "$1: f32[2] = aten.add.Tensor($0, 1)",
        "$2: f32[2] = aten.add_.Tensor($1, %0)",
        "$3: f32[2] = aten.mul_.Tensor($2, $0)",
        "return ($3)",
    ]
    values = [op.outputs[0] for op in graph.ops]
    assert len({v.storage for v in values}) == 1
    assert [v.version for v in values] == [0, 1, 2]
    assert [len(op.effects.writes) for op in graph.ops] == [0, 1, 1]


def test_a_result_in_the_memory_of_two_operands_is_of_the_first() -> None:
    x = torch.zeros(4)
    for operands, owner in (([x, x[1:]], 0), ([torch.zeros(1), x[1:], x], 1), ([torch.zeros(4)], None)):
        spec, (new,) = describe_result(result := x[2:], operands, type_of)
        assert spec.results == ((type_of(result), owner),) and new is result


def test_a_view_of_a_number_is_no_view() -> None:
    x = torch.randn(3, dtype=torch.complex64, requires_grad=True)
    graph = record(lambda: (x * 1j).abs().sum().backward(), warmup=1)
    (conj,) = [op for op in graph.ops if op.target is torch.ops.aten._conj.default]
    assert not conj.inputs and conj.kind is Kind.EXTERN


def test_a_view_shares_its_base_storage() -> None:
    x = torch.zeros(2, 3, requires_grad=True)
    graph = record(lambda: x.t()[0])
    transpose, select = graph.ops
    assert transpose.outputs[0].storage == graph.inputs[0].storage == select.outputs[0].storage
    assert select.outputs[0].type.stride == (3,)


def test_whether_inputs_share_memory_is_part_of_what_a_region_is() -> None:
    x = torch.zeros(4)
    shared, apart = (x[:2], x[2:]), (torch.zeros(2), torch.zeros(4)[2:])
    for left, right in (shared, apart):
        assert len({v.storage for v in record(lambda: left + right).inputs}) == (1 if left is shared[0] else 2)  # noqa: B023
    assert kitsune.counters()["regions"] == 2


def test_minibatches_sliced_from_one_tensor_are_one_region() -> None:
    data, weight = torch.randn(12, 3), torch.randn(3, 2, requires_grad=True)
    for i in range(4):
        with kitsune.accelerate(warmup=0, device="cpu"):
            batch = data[3 * i : 3 * i + 3]
            assert batch.storage_offset() == 9 * i
            loss = (batch.view(-1).view(3, 3) @ weight).sum()
        assert torch.equal(loss, (data[3 * i : 3 * i + 3] @ weight).sum())
    assert (kitsune.counters()["regions"], kitsune.counters()["recognised"]) == (1, 3)


def test_a_view_of_a_parameter_begins_where_it_begins() -> None:
    flat = torch.arange(8.0)
    for start in (0, 4):
        part = flat[start : start + 4].detach().requires_grad_()
        kept = []
        record(lambda: kept.append(part.view(2, 2).t()))  # noqa: B023 - called at once
        assert kept[0].storage_offset() == start
        assert torch.equal(kept[0], part.view(2, 2).t())


def test_what_is_dropped_is_no_output() -> None:
    x = torch.zeros(2)

    def program() -> torch.Tensor:
        y = x + 1
        z = y * 2
        del y
        return z

    graph = record(program)
    assert [v.id for v in graph.outputs] == [graph.ops[1].outputs[0].id]


def test_a_random_op_says_so() -> None:
    x = torch.zeros(2)
    graph = record(lambda: torch.dropout(x + 1, 0.5, True))
    assert [op.effects.random for op in graph.ops] == [
        "bernoulli" in str(op.target) or "dropout" in str(op.target) for op in graph.ops
    ]
    assert any(op.effects.random for op in graph.ops)


def test_an_op_knows_its_line() -> None:
    x = torch.zeros(2)
    graph = record(lambda: x + 1)
    site = graph.ops[0].site
    assert site is not None
    assert site.file == __file__


def test_ops_of_one_call_have_its_line_and_what_a_hook_does_in_the_middle_of_it_has_the_hooks() -> None:
    x, classes = torch.ones(2, 3, requires_grad=True), torch.tensor([0, 2])

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.neg() if tensor.is_floating_point() else tensor

    def program() -> Any:
        with torch.autograd.graph.saved_tensors_hooks(pack, torch.neg):
            return torch.nn.functional.cross_entropy(x, classes)

    def line(function: Any) -> int:
        return int(function.__code__.co_firstlineno)

    places = {"_log_softmax": line(program) + 2, "nll_loss_forward": line(program) + 2, "neg": line(pack) + 1}
    ops = record(program, warmup=1).ops
    names = [op.target._opname for op in ops]
    assert names.index("_log_softmax") < names.index("neg") < names.index("nll_loss_forward")
    for op in ops:
        assert op.site is not None and op.site.line == places[op.target._opname], op


def test_calls_at_two_lines_are_told_apart_though_each_line_is_looked_for_once() -> None:
    x = torch.ones(2, 3)

    def program() -> Any:
        y = x.softmax(1)
        return torch.nn.functional.cross_entropy(y, torch.ones(2, dtype=torch.long))

    lines = {op.target._opname: op.site.line for op in record(program, warmup=1).ops if op.site is not None}
    first = program.__code__.co_firstlineno
    assert lines["_softmax"] == first + 1
    assert lines["_log_softmax"] == lines["nll_loss_forward"] == first + 2


@pytest.mark.parametrize("warmup", [0, 1])
def test_an_op_that_came_to_nothing_has_written_nothing(warmup: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, emit = torch.zeros(2), Recorder.emit

    def interrupted(*args: Any) -> Any:
        monkeypatch.setattr(Recorder, "emit", emit)
        raise KeyboardInterrupt

    def program() -> Any:
        y = x + 1
        monkeypatch.setattr(Recorder, "emit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            y.add_(1)
        return y.mul_(2)

    graph = record(program, warmup=warmup)
    assert [str(op.target) for op in graph.ops] == ["aten.add.Tensor", "aten.mul_.Tensor"]
    assert [v.version for op in graph.ops for v in op.outputs] == [0, 1]


def test_a_result_is_an_operand_or_new_and_knows_whose_memory_it_shares() -> None:
    x, y = torch.zeros(4), torch.zeros(4)
    view, base = y[1:], torch.zeros(4)
    spec, new = describe_result((x, [view, base], base[1:], None), [y, x, x], type_of)
    assert spec.structure == (Operand(1), [Result(0), Result(1)], Result(2), None)
    assert [alias for _, alias in spec.results] == [0, None, -2]
    assert new[0] is view and new[1] is base and len(new) == 3
    assert describe_result(x, [y, x, x], type_of) == (OutputSpec((), Operand(1)), [])


def test_observed_and_recorded_graphs_are_equal() -> None:
    x = torch.ones(2, 2, requires_grad=True)

    def program() -> Any:
        y = (x @ x).relu().sum()
        y.backward()
        return y

    observed = record(program, warmup=1)
    x.grad = None
    again = record(program, warmup=1)
    x.grad = None
    lazy = record(program, warmup=0)
    assert lines(observed)[:-1] == lines(again)[:-1] == lines(lazy)[:-1]
    assert kitsune.counters()["observed"] == len(observed.ops)


def test_a_list_of_tensors_is_written_tensor_by_tensor() -> None:
    xs = [torch.zeros(2), torch.zeros(3)]
    graph = record(lambda: torch._foreach_add_(xs, 1.5))
    (op,) = graph.ops
    assert [(a.id, b.version) for a, b in op.rewritten] == [(0, 1), (1, 1)]
    assert [x._version for x in xs] == [1, 1]


def test_the_default_dtype_is_part_of_what_a_region_is() -> None:
    def program() -> torch.dtype:
        with kitsune.accelerate(warmup=0, device="cpu"):
            return (torch.arange(3) * 1.5).dtype

    assert program() == torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        assert program() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert program() == torch.float32


def test_a_program_that_never_repeats_keeps_no_endless_memory() -> None:
    with kitsune.config.patch(max_pending_ops=50):
        for n in range(1, 400):
            with kitsune.accelerate(warmup=0, device="cpu"):
                x = torch.zeros(n)
                for _ in range(5):
                    x = x + 1
        pipeline = next(p for p in kitsune.session._thread.pipelines.values() if p.recorder.max_ops == 50)
        assert pipeline.recorder.n_nodes <= 5 * 50 + 50
    assert x.sum().item() == 5 * 399
