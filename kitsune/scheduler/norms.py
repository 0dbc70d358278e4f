"""Backwards of normalisations taken apart: their results are sums over different dimensions, which no one kernel makes."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch._ops import OpOverload

from kitsune.ir import Graph, Kind, Op, Result, Value, named
from kitsune.scheduler.build import Builder

aten = torch.ops.aten
HALF = (torch.bfloat16, torch.float16)


def layer_norm_backwards(graph: Graph, why_not: Callable[[Op], str | None]) -> Graph:
    """The gradient of the input by itself, those of weight and bias as sums over the rows, where kernels can be made of both."""
    if not any(op.target is aten.native_layer_norm_backward.default for op in graph.ops):
        return graph
    # What is written later could be read no more as it was.
    written = {storage for op in graph.ops for storage in op.effects.writes}
    makers = {v.id: op for op in graph.ops for v in op.results if op.inputs and op.inputs[0].storage not in written}
    b = Builder(graph)
    for op in graph.ops:
        start = len(b.ops)
        if op.target is not aten.native_layer_norm_backward.default or not _take_apart(b, op, makers):
            b.ops.append(op)
        elif any(made.kind is not Kind.VIEW and why_not(made) is not None for made in b.ops[start:]):
            b.ops[start:] = [op]
    return Graph(graph.inputs, tuple(b.ops), graph.outputs)


def _take_apart(b: Builder, op: Op, makers: dict[int, Op]) -> bool:
    arguments = named(op)
    wanted = tuple(arguments["output_mask"])
    grad, x = arguments["grad_out"], arguments["input"]
    n = len(x.type.shape) - len(arguments["normalized_shape"])
    if not any(wanted[1:]) or n < 1 or len(op.results) != sum(wanted) or not x.type.nbytes:
        return False
    results = dict(zip([k for k in range(3) if wanted[k]], op.results, strict=True))
    shape = tuple(x.type.shape)
    wide = torch.float64 if x.type.dtype is torch.float64 else torch.float32
    # Products and sums of a 16-bit type and float32 are float32: nothing wide need be written for two kernels to read.
    source = _before_cast(b, op, grad, makers)
    if wanted[0]:
        b.ops.append(_input_gradient(op, results[0]))
    if wanted[1]:
        centred = _pointwise(b, aten.sub.Tensor, _widened(b, op, x, wide), arguments["mean"], wide, shape, op)
        unit = _pointwise(b, aten.mul.Tensor, centred, arguments["rstd"], wide, shape, op)
        _sum_of_rows(b, op, _pointwise(b, aten.mul.Tensor, source, unit, wide, shape, op), wide, n, results[1])
    if wanted[2]:
        _sum_of_rows(b, op, source, wide, n, results[2])
    return True


def _input_gradient(op: Op, result: Value) -> Op:
    names = [a.name for a in op.target._schema.arguments]
    arguments = named(op) | {"output_mask": (True, False, False)}
    return replace(
        op, args=tuple(arguments[name] for name in names), kwargs=(), structure=(Result(0), None, None), results=(result,)
    )


def _before_cast(b: Builder, op: Op, value: Value, makers: dict[int, Op]) -> Value:
    """What was widened to this value: two kernels that read it need not have the wide one written for them."""
    maker, wide = makers.get(value.id), value
    while maker is not None and maker.target is aten.view.default:
        wide = maker.inputs[0]
        maker = makers.get(wide.id)
    if maker is None or maker.target is not aten._to_copy.default:
        return value
    source = maker.inputs[0]
    if source.type.dtype not in HALF or source.type.stride != wide.type.stride or not wide.type.canonical:
        return value
    return source if wide is value else b.view(op, source, value.type.shape, value.type.stride)


def _widened(b: Builder, op: Op, value: Value, dtype: torch.dtype) -> Value:
    if value.type.dtype is dtype:
        return value
    return b.call(op, aten._to_copy.default, Kind.POINTWISE, (value,), (dtype, tuple(value.type.shape)), dtype=dtype)


def _pointwise(b: Builder, target: OpOverload, x: Value, y: Value, dtype: torch.dtype, shape: tuple[int, ...], like: Op) -> Value:
    return b.call(like, target, Kind.POINTWISE, (x, y), (dtype, shape))


def _sum_of_rows(b: Builder, op: Op, value: Value, dtype: torch.dtype, n: int, result: Value) -> None:
    """The sum over the first `n` dimensions, rounded to the type of the result once it is complete."""
    narrow = result.type.dtype is not dtype
    made = (dtype, tuple(result.type.shape)) if narrow else result
    total = b.call(op, aten.sum.dim_IntList, Kind.REDUCTION, (value, tuple(range(n))), made, dtype=dtype)
    if narrow:
        b.call(op, aten._to_copy.default, Kind.POINTWISE, (total,), result, dtype=result.type.dtype)
