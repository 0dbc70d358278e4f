"""What a kernel along rows has in registers, element by element, so that it may add it up across rows as well."""

from collections.abc import Callable

from kitsune.ir import Graph, Kind, Op, Value, reduction_of


def along_rows(graph: Graph, why_not: Callable[[Op], str | None]) -> set[int]:
    """The storages of what a reduction along neighbours in memory reads and makes, and of what pointwise ops make of that."""
    held: set[int] = set()
    for op in graph.ops:
        if op.kind is Kind.POINTWISE and any(v.storage in held and _is_whole(v, op.outputs) for v in op.inputs):
            held |= {v.storage for v in op.outputs}
        elif op.kind is Kind.REDUCTION and (reduction := reduction_of(op)) is not None and why_not(op) is None:
            whole = [v for v in (*op.inputs, *op.results) if v.type.shape == reduction.shape]
            if whole and _is_along(whole[0], reduction.dims):
                held |= {v.storage for v in whole}
    # What an op reads that feeds such a reduction: its other readers come in any order.
    for op in reversed(graph.ops):
        if op.kind is Kind.POINTWISE and any(v.storage in held for v in op.outputs):
            held |= {v.storage for v in op.inputs if _is_whole(v, op.outputs)}
    return held


def _is_whole(value: Value, outputs: tuple[Value, ...]) -> bool:
    return any(value.type.shape.numel() == v.type.shape.numel() for v in outputs)


def _is_along(value: Value, dims: tuple[int, ...]) -> bool:
    moving = [d for d, n in enumerate(value.type.shape) if n > 1 and value.type.stride[d]]
    return bool(moving) and min(moving, key=lambda d: value.type.stride[d]) in dims
