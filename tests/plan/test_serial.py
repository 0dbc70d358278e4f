"""A graph that was written and read again is the same graph: the same text, the same effects, the same results."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kitsune
from kitsune.ir import Graph, Kind, Op, Slot, Value, verify
from kitsune.ir.serial import dump_graph, load_graph
from kitsune.runtime import prepare, replay
from kitsune.session import trace_regions

X = torch.arange(24.0).reshape(4, 6)
Program = Callable[[Tensor], Any]


def graph_of(program: Program, x: Tensor = X) -> Graph:
    """The graph of the program's biggest region, recorded lazily on the CPU. State that it makes is there the third time."""
    kitsune.reset()
    with trace_regions() as graphs, kitsune.accelerate(warmup=1, device="cpu"):
        for _ in range(3):
            graphs.clear()
            kept = program(x.clone())
            kitsune.flush()
    del kept
    return max(graphs, key=lambda graph: len(graph.ops))


def fields_of(op: Op) -> tuple[Any, ...]:
    """What `str(op)` does not show."""
    inputs = tuple(v.id for v in op.inputs)
    return op.target, op.kind, repr(op.args), repr(op.kwargs), inputs, op.structure, op.effects, op.grad_enabled


def there_and_back(graph: Graph) -> Graph:
    """The graph, written and read; fails if anything is lost on the way."""
    text = dump_graph(graph)
    again = load_graph(text)
    verify(again)
    assert str(again) == str(graph)
    assert dump_graph(again) == text
    for op, read in zip(graph.ops, again.ops, strict=True):
        assert fields_of(read) == fields_of(op)
    return again


def constants(graph: Graph) -> list[Any]:
    """Every leaf among the arguments that is not a Value."""
    found: list[Any] = []

    def walk(a: Any) -> None:
        if isinstance(a, (tuple, list)):
            for x in a:
                walk(x)
        elif not isinstance(a, Value):
            found.append(a)

    for op in graph.ops:
        walk(op.args)
        walk([a for _, a in op.kwargs])
    return found


def masked(value: float) -> Program:
    return lambda x: x.masked_fill(x > 3, value)


# Each program with a constant that must be among the arguments of its graph.
ARGUMENTS: dict[str, tuple[Program, Any]] = {
    "int": (lambda x: x.sum(1), 1),
    "bool": (lambda x: x.sum(1, keepdim=True), True),
    "float": (masked(0.1), 0.1),
    "inf": (masked(math.inf), math.inf),
    "minus inf": (masked(-math.inf), -math.inf),
    "smallest float": (masked(5e-324), 5e-324),
    "complex": (lambda x: torch.full_like(x, 1 - 2j, dtype=torch.complex64), 1 - 2j),
    "text": (lambda x: F.gelu(x, approximate="tanh"), "tanh"),
    "None": (lambda x: F.layer_norm(x, (6,)), None),
    "dtype": (lambda x: x.to(torch.bfloat16), torch.bfloat16),
    "device": (lambda x: x + torch.ones(6, device="cpu"), torch.device("cpu")),
    "layout": (lambda x: x + torch.zeros_like(x, layout=torch.strided), torch.strided),
    "memory format": (lambda x: x.view(1, 4, 2, 3).contiguous(memory_format=torch.channels_last), torch.channels_last),
    "None in a list": (lambda x: x[:, torch.tensor([1, 3])], None),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_constant_comes_back(name: str) -> None:
    program, constant = ARGUMENTS[name]
    again = there_and_back(graph_of(program))
    assert any(type(c) is type(constant) and c == constant for c in constants(again))


def test_not_a_number_comes_back() -> None:
    again = there_and_back(graph_of(masked(math.nan)))
    assert any(isinstance(c, float) and math.isnan(c) for c in constants(again))


def test_moving_floats_are_slots() -> None:
    again = there_and_back(graph_of(lambda x: x * 0.5 + x.mul(0.25)))
    assert [c for c in constants(again) if isinstance(c, Slot)] == [Slot(0), Slot(1)]


def test_lists_of_tensors_come_back() -> None:
    again = there_and_back(graph_of(lambda x: torch._foreach_mul([x, x + 1], [2.0, 3.0])))
    (foreach,) = (op for op in again.ops if "_foreach" in str(op.target))
    assert len(foreach.inputs) == 2
    assert len(foreach.results) == 2


def test_several_results_come_back() -> None:
    again = there_and_back(graph_of(lambda x: [*x.max(1), *x.split(2, dim=1)]))
    assert [len(op.results) for op in again.ops[-2:]] == [2, 3]


def test_in_place_ops_keep_their_effects() -> None:
    def program(x: Tensor) -> Any:
        y = x.relu()
        y.add_(1).mul_(x)
        y[0].zero_()
        torch._foreach_add_([y, x], 2.0)
        return y, x

    graph = graph_of(program)
    again = there_and_back(graph)
    assert [op.effects.writes for op in again.ops] == [op.effects.writes for op in graph.ops]
    assert sum(bool(op.rewritten) for op in again.ops) == 4


def test_types_keep_strides_offset_and_conjugation() -> None:
    again = there_and_back(graph_of(lambda x: torch.complex(x.t()[2:], x.t()[2:]).conj()))
    types = [value.type for op in again.ops for value in op.results]
    assert any(t.conj for t in types)
    assert any(t.offset and not t.canonical for t in types)


def test_random_ops_and_grad_mode_come_back() -> None:
    weight = torch.randn(2, 1, 3, 3, requires_grad=True)

    def program(x: Tensor) -> Any:
        with torch.no_grad():
            y = F.conv2d(x.view(1, 1, 4, 6), weight)
        return F.dropout(y, 0.5) + F.conv2d(x.view(1, 1, 4, 6), weight)

    again = there_and_back(graph_of(program))
    assert any(op.effects.random for op in again.ops)
    assert {op.grad_enabled for op in again.ops if op.kind is Kind.EXTERN} >= {True, False}


def training_step(optimizer: str) -> Program:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3))
    made = {
        "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
        "adamw": lambda p: torch.optim.AdamW(p, 0.1),
        "adamw foreach": lambda p: torch.optim.AdamW(p, 0.1, foreach=True),
        "adamw fused": lambda p: torch.optim.AdamW(p, 0.1, fused=True),
    }[optimizer](model.parameters())

    def step(x: Tensor) -> Any:
        made.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), torch.tensor([0, 1, 2, 0]))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        made.step()
        return loss.detach()

    return step


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "adamw foreach", "adamw fused"])
def test_a_training_step_comes_back(optimizer: str) -> None:
    again = there_and_back(graph_of(training_step(optimizer)))
    assert {op.kind for op in again.ops} >= {Kind.POINTWISE, Kind.REDUCTION, Kind.VIEW, Kind.GEMM}


def run(graph: Graph, inputs: list[Tensor], scalars: list[float]) -> list[Tensor]:
    top = max(v.id for op in graph.ops for v in op.outputs)
    values: list[Any] = [None] * (top + 1)
    for value, tensor in zip(graph.inputs, inputs, strict=True):
        values[value.id] = tensor.clone()
    replay(prepare(graph), values, scalars)
    return [values[v.id] for v in graph.outputs]


def test_a_graph_that_was_read_computes_the_same() -> None:
    graph = graph_of(lambda x: F.softmax((x * 0.5).relu().add_(x).masked_fill(x > 20, -math.inf), 1))
    expected, found = run(graph, [X], [0.5]), run(there_and_back(graph), [X], [0.5])
    assert expected
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a, b)


def test_an_unknown_operator_is_named() -> None:
    text = dump_graph(graph_of(lambda x: x.relu())).replace("aten::relu", "aten::not_there")
    with pytest.raises(ValueError, match="this version of torch has no operator aten::not_there"):
        load_graph(text)
