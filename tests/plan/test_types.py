"""Passes put operators into a graph: each result has the type that torch gives it, whatever the pass wrote down."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from kitsune.dispatch import infer
from kitsune.ir import Graph, Op, Operand, Result, Slot, TensorType, Value
from kitsune.planning import planner_for
from tests.plan.test_corpus_plans import FILES, graph_of

SMALL = [path for path in FILES if path.name.startswith(("gpt2-small-amp-cpu", "resnet18-small-amp", "vit-small-amp-cpu"))]


def leaves(told: Any, given: Any) -> Iterator[tuple[Any, Any]]:
    """Of two structures of a return value: what stands where the first has a result."""
    if isinstance(told, Result):
        yield told, given
    elif isinstance(told, (tuple, list)):
        for a, b in zip(told, given, strict=True):
            yield from leaves(a, b)


def wrong_types(op: Op) -> list[str] | None:
    """What torch gives otherwise; None where meta tensors cannot tell."""
    places = {value.id: Operand(k) for k, value in reversed(list(enumerate(op.inputs)))}

    def bound(argument: Any) -> Any:
        if isinstance(argument, Value):
            return places[argument.id]
        if isinstance(argument, tuple):
            return [bound(a) for a in argument]
        return 0.5 if isinstance(argument, Slot) else argument

    args, kwargs = bound(op.args), {name: bound(a) for name, a in op.kwargs}
    operands = [(value.type, value.storage) for value in op.inputs]
    spec = infer(op.target, args, kwargs, operands, op.outputs[0].type.device)
    if spec is None:
        return None
    pairs = [(op.results[a.index].type, spec.results[b.index][0]) for a, b in leaves(op.structure, spec.structure)]
    return [f"{op.target}: {a} instead of {b}" for a, b in pairs if (a.dtype, a.shape) != (b.dtype, b.shape)]


def put_in(before: Graph, after: Graph) -> list[Op]:
    known = set(map(id, before.ops))
    return [op for op in after.ops if id(op) not in known and op.results]


def test_types_are_those_that_torch_gives() -> None:
    seen: Counter[str] = Counter()
    for path in SMALL:
        graph = graph_of(path)
        for op in put_in(graph, planner_for("sm_90", numerics="strict").plan(graph).graph):
            wrong = wrong_types(op)
            assert not wrong, f"{path.name}: {wrong}"
            seen[op.target._opname] += wrong is not None
    assert {"logsumexp", "ne", "nll_loss_forward", "sum", "_to_copy", "var_mean"} <= set(seen), seen


def test_a_wrong_type_is_told() -> None:
    x = Value(0, TensorType(torch.float32, torch.Size([2, 3]), (3, 1), 0, torch.device("cpu")), 0)
    made = Value(1, TensorType(torch.float16, torch.Size([2]), (1,), 0, torch.device("cpu")), 1)
    op = Op(torch.ops.aten.logsumexp.default, graph_of(SMALL[0]).ops[0].kind, (x, (1,)), (), (x,), Result(0), (made,))
    assert wrong_types(op) == ["aten.logsumexp.default: f16[2] instead of f32[2]"]
