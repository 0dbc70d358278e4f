"""Sums of few, long rows in two stages: of parts of the rows, which fill the device, and of those."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._ops import OpOverload

from kitsune.ir import Graph, Kind, Op, Reduction, TensorType, Value, named, reduction_of
from kitsune.scheduler.beside import along_rows
from kitsune.scheduler.build import Builder, Made
from kitsune.scheduler.cuts import HALF, Cut, Parts, find_cut

aten = torch.ops.aten
_MOMENTS = (aten.var.correction, aten.std.correction, aten.var_mean.correction, aten.std_mean.correction)


def split_reductions(graph: Graph, parts: Parts, why_not: Callable[[Op], str | None]) -> Graph:
    """Every sum, mean, norm, largest or smallest that has too few rows for the device, in two stages where those can be kernels.

    The order of summation is the same each time. Between the stages, numbers are of the type that a kernel sums in.
    """
    if not any(op.kind is Kind.REDUCTION for op in graph.ops):
        return graph
    b = Builder(graph)
    made: dict[int, TensorType] = {v.storage: v.type for v in graph.inputs}
    held = along_rows(graph, why_not)
    for op in graph.ops:
        start = len(b.ops)
        for value in op.results:
            made.setdefault(value.storage, value.type)
        reduction = reduction_of(op) if op.target._opname in _STAGES or _is_moments(op) else None
        cut = None
        if reduction is not None:
            x = op.inputs[0].storage
            cut = find_cut(op, reduction, parts, made[x], x in held and op.target._opname == "sum")
        if reduction is None or cut is None or why_not(op) is not None:
            b.ops.append(op)
            continue
        (_moments if _is_moments(op) else _in_two)(b, op, reduction, cut)
        if any(made.kind is not Kind.VIEW and why_not(made) is not None for made in b.ops[start:]):
            b.ops[start:] = [op]
    return Graph(graph.inputs, tuple(b.ops), graph.outputs)


def _in_two(b: Builder, op: Op, reduction: Reduction, cut: Cut) -> None:
    result = op.results[0]
    stage = _STAGES[op.target._opname]
    # A comparison rounds nothing: it stays in the type of what it compares.
    wide = torch.float32 if result.type.dtype in HALF and stage not in (_largest, _smallest) else result.type.dtype
    x, inner, left, shape = _first_stage(b, op, reduction, cut)
    partial = stage(b, op, x, inner, False, wide, (wide, left))
    partial = _seen(b, op, partial, left, shape)
    keep = len(result.type.shape) == len(shape)
    narrow = wide is not result.type.dtype
    made = (wide, tuple(result.type.shape)) if narrow else result
    total = stage(b, op, partial, reduction.dims, keep, wide, made)
    if narrow:
        b.call(op, aten._to_copy.default, Kind.POINTWISE, (total,), result, dtype=result.type.dtype)


def _first_stage(b: Builder, op: Op, reduction: Reduction, cut: Cut) -> tuple[Value, tuple[int, ...], list[int], list[int]]:
    """What the first stage reads and reduces, what is left of that, and how the second stage sees it."""
    x, inner = op.inputs[0], tuple(d for d in reduction.dims if d not in cut.whole)
    if cut.dim >= 0:
        x, inner = _seen_cut(b, op, x, cut, inner)
    left = [n for d, n in enumerate(x.type.shape) if d not in inner]
    shape = [
        cut.parts if d == cut.dim else 1 if d in reduction.dims and d not in cut.whole else n
        for d, n in enumerate(reduction.shape)
    ]
    return x, inner, left, shape


def _seen(b: Builder, op: Op, partial: Value, left: list[int], shape: list[int]) -> Value:
    return partial if shape == left else b.view(op, partial, shape, _strides(shape))


def _is_moments(op: Op) -> bool:
    """A variance or a deviation, with the mean or alone, of rows that are longer than its correction."""
    if op.target not in _MOMENTS:
        return False
    reduction = reduction_of(op)
    return reduction is not None and math.prod(reduction.shape[d] for d in reduction.dims) > _correction(op)


def _correction(op: Op) -> float:
    given = named(op).get("correction")
    return 1 if given is None else given


def _moments(b: Builder, op: Op, reduction: Reduction, cut: Cut) -> None:
    """Variance and mean: of parts, and then the mean of means, and the mean of variances with the variance of means."""
    spread, mean = op.results[0], op.results[1] if len(op.results) > 1 else None
    half = spread.type.dtype in HALF
    dtype, sizes = torch.float32 if half else spread.type.dtype, tuple(spread.type.shape)
    x, inner, left, shape = _first_stage(b, op, reduction, cut)
    made, keep = (dtype, sizes), len(sizes) == len(shape)
    keys = {"correction": 0, "keepdim": False}
    parts = b.calls(op, aten.var_mean.correction, Kind.REDUCTION, (x, inner), [(dtype, left)] * 2, **keys)
    within, means = (_seen(b, op, part, left, shape) for part in parts)
    keys = {"correction": 0, "keepdim": keep}
    results: tuple[Made, Made] = (made, made if half or mean is None else mean)
    between, whole = b.calls(op, aten.var_mean.correction, Kind.REDUCTION, (means, reduction.dims), results, **keys)
    if mean is not None and half:
        b.call(op, aten._to_copy.default, Kind.POINTWISE, (whole,), mean, dtype=mean.type.dtype)
    now = b.call(op, aten.mean.dim, Kind.REDUCTION, (within, reduction.dims, keep), made, dtype=dtype)
    steps: list[tuple[OpOverload, tuple[Any, ...], dict[str, Any]]] = [(aten.add.Tensor, (between,), {})]
    if correction := _correction(op):
        n = math.prod(reduction.shape[d] for d in reduction.dims)
        steps.append((aten.mul.Tensor, (n / (n - correction),), {}))
    if op.target._opname.startswith("std"):
        steps.append((aten.sqrt.default, (), {}))
    if half:
        steps.append((aten._to_copy.default, (), {"dtype": spread.type.dtype}))
    for k, (target, operands, keys) in enumerate(steps):
        now = b.call(op, target, Kind.POINTWISE, (now, *operands), spread if k == len(steps) - 1 else made, **keys)


def _seen_cut(b: Builder, op: Op, x: Value, cut: Cut, inner: tuple[int, ...]) -> tuple[Value, tuple[int, ...]]:
    """A view with the dimension in two, and the dimensions to be reduced of that."""
    shape, stride, d = list(x.type.shape), list(x.type.stride), cut.dim
    rest = shape[d] // cut.parts
    two = (rest, cut.parts) if cut.in_turn else (cut.parts, rest)
    seen = b.view(op, x, [*shape[:d], *two, *shape[d + 1 :]], [*stride[:d], stride[d] * two[1], *stride[d:]])
    return seen, tuple(sorted(k + (k > d or (k == d and not cut.in_turn)) for k in inner))


def _strides(shape: Sequence[int]) -> list[int]:
    return [math.prod(shape[d + 1 :]) for d in range(len(shape))]


# A stage: of a value over dimensions, keeping them or not, summed in a dtype; the result is known or to be made.
Stage = Callable[[Builder, Op, Value, tuple[int, ...], bool, torch.dtype, Any], Value]


def _sum(b: Builder, op: Op, x: Value, dims: tuple[int, ...], keep: bool, wide: torch.dtype, made: Any) -> Value:
    return b.call(op, aten.sum.dim_IntList, Kind.REDUCTION, (x, dims, keep), made, dtype=wide)


def _mean(b: Builder, op: Op, x: Value, dims: tuple[int, ...], keep: bool, wide: torch.dtype, made: Any) -> Value:
    return b.call(op, aten.mean.dim, Kind.REDUCTION, (x, dims, keep), made, dtype=wide)


def _norm(b: Builder, op: Op, x: Value, dims: tuple[int, ...], keep: bool, wide: torch.dtype, made: Any) -> Value:
    return b.call(op, aten.linalg_vector_norm.default, Kind.REDUCTION, (x, 2, dims, keep), made, dtype=wide)


def _largest(b: Builder, op: Op, x: Value, dims: tuple[int, ...], keep: bool, wide: torch.dtype, made: Any) -> Value:
    return b.call(op, aten.amax.default, Kind.REDUCTION, (x, dims, keep), made)


def _smallest(b: Builder, op: Op, x: Value, dims: tuple[int, ...], keep: bool, wide: torch.dtype, made: Any) -> Value:
    return b.call(op, aten.amin.default, Kind.REDUCTION, (x, dims, keep), made)


_STAGES: dict[str, Stage] = {
    "sum": _sum,
    "mean": _mean,
    "norm": _norm,
    "linalg_vector_norm": _norm,
    "amax": _largest,
    "amin": _smallest,
}
