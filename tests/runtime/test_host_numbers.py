"""Numbers on the host beside a device's tensors (`tokens[:, 0] = 5`, `x * torch.tensor(0.5)`): graphs hold while they stay."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import kitsune
from kitsune.ir import Effects, Graph, Kind, Op, Result, Value
from kitsune.ir.tensor_type import default_type
from kitsune.runtime import GraphFacts, capturable
from tests.runtime.checked import forget
from tests.runtime.repeated import counts, graphs

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
STEPS = 24


def value(number: int, shape: tuple[int, ...], device: str, storage: int | None = None) -> Value:
    return Value(number, default_type(torch.float32, shape, device), number if storage is None else storage)


def op(target: Any, inputs: tuple[Value, ...], *results: Value, kind: Kind = Kind.POINTWISE, **more: Any) -> Op:
    return Op(target, kind, inputs, (), inputs, Result(0), results, **more)


A, B, HALF, ROW = value(0, (2, 3), "cuda"), value(1, (2, 3), "cuda"), value(2, (), "cpu"), value(3, (3,), "cpu")
WRITTEN, VIEW = value(4, (), "cpu", HALF.storage), value(5, (), "cpu", HALF.storage)


@pytest.mark.parametrize(
    ("graph", "said"),
    [
        (Graph((A, HALF), (op(aten.mul.Tensor, (A, HALF), B),), (B,)), None),
        (Graph((A, HALF), (op(aten.fill_.Tensor, (A, HALF), B),), (B,)), None),
        (Graph((A, ROW), (op(aten.mul.Tensor, (A, ROW), B),), (B,)), "aten.mul.Tensor at None reads a tensor on the CPU"),
        # A copy to the device, in which the host waits.
        (Graph((A, HALF), (op(aten.where.self, (A, A, HALF), B),), (B,)), "aten.where.self at None reads a tensor on the CPU"),
        (Graph((A, HALF), (op(aten.index.Tensor, (A, HALF), B, kind=Kind.EXTERN),), (B,)), "reads a tensor on the CPU"),
        (Graph((A, HALF), (op(aten.mul.Tensor, (A, HALF), B),), (B, HALF)), "reads a tensor on the CPU"),
        (
            Graph((A, HALF), (op(aten.exp_.default, (HALF,), rewritten=((HALF, WRITTEN),), effects=Effects((2,))),), (B,)),
            "reads a tensor on the CPU",
        ),
        (
            Graph((A, HALF), (op(aten.view.default, (HALF,), VIEW, kind=Kind.VIEW), op(aten.mul.Tensor, (A, VIEW), B)), (B,)),
            "reads a tensor on the CPU",
        ),
    ],
    ids=str,
)
def test_numbers_that_kernels_are_given_are_told_from_what_is_read_on_the_host(graph: Graph, said: str | None) -> None:
    facts = GraphFacts(graph, CUDA)
    if said is None:
        assert facts.refusal is None and (facts.inputs, facts.host_numbers) == ((0,), (2,))
    else:
        assert said in (facts.refusal or "")


def train(context: Any, number: Callable[[int], torch.Tensor | float], kind: str, device: str = "cpu") -> list[torch.Tensor]:
    """The losses and weights of steps that use a number, another one in each if it is so."""
    torch.manual_seed(0)
    model = nn.Linear(8, 8).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, found = torch.randn(4, 8).to(device), []
    with context:
        for k in range(STEPS):
            n = number(k)
            optimizer.zero_grad()
            h = model(x)
            if kind == "set":
                h = h.clone()
                h[:, 0] = n
            elif kind == "compared":
                h = h * (h.detach() > n)
            else:
                h = h.to(torch.bfloat16) * n
            loss = h.float().square().sum()
            loss.backward()
            optimizer.step()
            found.append(loss.detach())
    return [loss.clone().cpu() for loss in found] + [p.detach().cpu() for p in model.parameters()]


def same(expected: list[torch.Tensor], found: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.fixture
def on_host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Regions of the CPU take what has no dimensions, and is only given to kernels, for a number on the host."""

    def is_one(v: Value, graph: Graph, kind: str) -> bool:
        readers = [op for op in graph.ops if v in op.inputs]
        return not v.type.shape and bool(readers) and all(op.kind is Kind.POINTWISE for op in readers)

    monkeypatch.setattr(capturable, "is_host_number", is_one)
    with graphs(kernels=False) as repeater:
        yield repeater


def accelerated(device: str = "cpu") -> Any:
    stack = contextlib.ExitStack()
    stack.enter_context(kitsune.config.patch(gate=False))
    stack.enter_context(kitsune.accelerate(device=device))
    return stack


@pytest.mark.parametrize("kind", ["compared", "product"])
@pytest.mark.parametrize("kept", [False, True], ids=["made anew", "one tensor"])
def test_a_number_that_stays_is_part_of_a_graph(kind: str, kept: bool, on_host: Any) -> None:
    one = torch.tensor(0.1, dtype=torch.float64)
    number = lambda k: one if kept else torch.tensor(0.1, dtype=torch.float64)  # noqa: E731
    expected = train(contextlib.nullcontext(), number, kind)
    assert same(expected, train(accelerated(), number, kind))
    replayed, missed, refused = counts("replayed", "graph_missed", "graph_refused")
    assert replayed >= STEPS - 5 and not missed and not refused


@pytest.mark.parametrize("bits", [(0.1, 0.7), (0.0, -0.0), (float("nan"), 0.5)], ids=str)
def test_one_that_changes_once_in_a_while_has_a_graph_each_time(bits: tuple[float, float], on_host: Any) -> None:
    number = lambda k: torch.tensor(bits[k >= STEPS // 2], dtype=torch.float64)  # noqa: E731
    expected = train(contextlib.nullcontext(), number, "product")
    found = train(accelerated(), number, "product")
    assert all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(expected, found, strict=True))
    replayed, missed, refused = counts("replayed", "graph_missed", "graph_refused")
    assert replayed >= STEPS - 8 and missed == {"a tensor of the host has another value": 1} and not refused


def test_one_tensor_that_is_written_between_steps_is_seen(on_host: Any) -> None:
    one = torch.tensor(0.1, dtype=torch.float64)

    def number(k: int) -> torch.Tensor:
        # Where nothing is recorded.
        one.untyped_storage().copy_(torch.tensor(0.1 + (k >= STEPS // 2), dtype=torch.float64).untyped_storage())
        return one

    expected = train(contextlib.nullcontext(), number, "product")
    assert same(expected, train(accelerated(), number, "product"))
    assert counts("replayed")[0] > STEPS // 2


def test_one_that_changes_in_each_step_is_refused_with_its_line(on_host: Any) -> None:
    number = lambda k: torch.tensor(0.1 * (k + 1), dtype=torch.float64)  # noqa: E731
    expected = train(contextlib.nullcontext(), number, "product")
    assert same(expected, train(accelerated(), number, "product"))
    replayed, (reason,) = counts("replayed", "graph_refused")
    assert replayed == 0 and "is given a number on the host that changes from run to run." in reason
    assert "test_host_numbers.py" in reason


@pytest.mark.gpu
@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "op by op"])
@pytest.mark.parametrize("kind", ["set", "compared", "product"])
@pytest.mark.parametrize("made", ["number", "tensor"])
@pytest.mark.parametrize("changes", [False, True], ids=["one value", "another later"])
def test_on_a_gpu(kind: str, made: str, fuse: bool, changes: bool) -> None:
    def number(k: int) -> Any:
        n = 0.1 + (changes and k >= STEPS // 2)
        return n if made == "number" else torch.tensor(n, dtype=torch.float64)

    expected = train(contextlib.nullcontext(), number, kind, "cuda")
    forget()
    with kitsune.config.patch(fuse=fuse, numerics="bitwise", compile_workers=0):
        assert same(expected, train(accelerated("cuda"), number, kind, "cuda"))
    replayed, refused = counts("replayed", "graph_refused")
    assert replayed >= STEPS - 9 and not refused
    forget()


@pytest.mark.gpu
def test_what_copies_a_number_to_the_device_is_no_part_of_a_graph() -> None:
    forget()
    x, zero = torch.randn(8, device="cuda"), torch.tensor(0.0)
    with accelerated("cuda"):
        for _ in range(8):
            y = torch.where(x > 0, x, zero) * 2
            kitsune.flush()
    assert torch.equal(y, torch.where(x > 0, x, zero) * 2)
    replayed, (reason,) = counts("replayed", "graph_refused")
    assert replayed == 0 and "aten.where.self at " in reason and "reads a tensor on the CPU" in reason
    forget()
