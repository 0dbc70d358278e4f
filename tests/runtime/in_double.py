"""A region computed in float64, and how far from it other ways to run the region are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from kitsune.dispatch import below_autograd
from kitsune.ir import Graph, Kind, Plan, Result, Slot, Value
from kitsune.runtime import prepare, replay
from tests.behind import behind
from tests.runtime.checked import Values, copied, executor
from tests.runtime.test_real_plans import Walk

# Sums in another order may be this much further from float64 than eager's are, in eager's largest distance.
AS_FAR = 2.0


def wide(a: Any) -> Any:
    """Floats as float64; other arguments as they are."""
    if isinstance(a, torch.Tensor):
        return a.double() if a.is_floating_point() else a.clone()
    if isinstance(a, torch.dtype):
        return torch.float64 if a.is_floating_point else a
    return a


def in_double(graph: Graph, values: Values, scalars: list[float]) -> dict[int, torch.Tensor]:
    """The graph's outputs by number."""
    there: dict[int, Any] = {v.id: wide(values[v.id]) for v in graph.inputs}

    def bound(a: Any) -> Any:
        if isinstance(a, Value):
            return there[a.id]
        if isinstance(a, Slot):
            return scalars[a.index]
        return [bound(x) for x in a] if isinstance(a, tuple) else wide(a)

    torch.manual_seed(0)
    for op in graph.ops:
        result = op.target(*map(bound, op.args), **{name: bound(a) for name, a in op.kwargs})
        for where, tensor in zip(_leaves(op.structure), _leaves(result), strict=True):
            if isinstance(where, Result):
                # A new tensor of ones is float32 without being told so.
                there[op.results[where.index].id] = tensor.double() if tensor.is_floating_point() else tensor
        there.update((after.id, there[before.id]) for before, after in op.rewritten)
    return {v.id: there[v.id] for v in graph.outputs}


def _leaves(structure: Any) -> Iterator[Any]:
    if isinstance(structure, (list, tuple)):
        for part in structure:
            yield from _leaves(part)
    else:
        yield structure


def replayed(graph: Graph, values: Values, scalars: list[float]) -> Values:
    """What a graph leaves when its ops are run one by one; it may have more values than were recorded."""
    values = copied(values)
    values += [None] * (1 + max((v.id for op in graph.ops for v in op.outputs), default=0) - len(values))
    torch.manual_seed(0)
    with below_autograd(), torch._C._DisableTorchDispatch():
        replay(prepare(graph), values, scalars)
    return values


def run_by_plan(plan: Plan, values: Values, scalars: list[float], start: Any = Walk) -> Values:
    """What a plan leaves, its kernels walking over memory as generated ones do; its inputs lie behind other numbers."""
    values = copied(values)
    # Of a view that was recorded the region knows where in the memory it lies.
    views = {value.storage for op in plan.graph.ops if op.kind is Kind.VIEW and not op.derived for value in op.results}
    shared = Counter(value.storage for value in plan.graph.inputs)
    for value in plan.graph.inputs:
        if value.storage not in views and shared[value.storage] == 1:
            values[value.id] = behind(values[value.id])
    torch.manual_seed(0)
    with below_autograd(), torch._C._DisableTorchDispatch():
        it, _ = executor(start)
        it.run(it.prepare(plan), values, scalars)
    return values


def assert_as_good(graph: Graph, exact: dict[int, torch.Tensor], eager: Values, got: Values) -> None:
    """Outputs in eager's layout, and no further from float64 than eager's, within what the order of a sum may change."""
    for value in graph.outputs:
        a, b, true = eager[value.id], got[value.id], exact[value.id]
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        if not a.is_floating_point():
            assert torch.equal(a, b)
            continue
        allowed = AS_FAR * (a.double() - true).abs().max() + torch.finfo(a.dtype).eps * true.abs().max()
        assert (b.double() - true).abs().max() <= allowed, f"${value.id}"
