"""New ops for a pass that puts several in the place of one."""

from collections.abc import Sequence
from typing import Any

import torch
from torch._ops import OpOverload

from kitsune.ir import Graph, Kind, Op, Result, TensorType, Value, tensor_type, values_in

aten = torch.ops.aten


class Builder:
    """The ops of a graph that is being rewritten, in order. What it makes has numbers that the graph does not use."""

    def __init__(self, graph: Graph) -> None:
        values = [*graph.inputs, *(v for op in graph.ops for v in op.outputs)]
        self.ops: list[Op] = []
        self._id = max((v.id for v in values), default=-1)
        self._storage = max((v.storage for v in values), default=-1)

    def call(
        self,
        like: Op,
        target: OpOverload,
        kind: Kind,
        args: Sequence[Any],
        result: Value | tuple[torch.dtype, Sequence[int]],
        **kwargs: Any,
    ) -> Value:
        """An op with one new tensor: a Value that is known already, or a contiguous one of a dtype and a shape."""
        value = result if isinstance(result, Value) else self._new(*result, like.results[0].type.device)
        self._add(like, target, kind, args, value, kwargs)
        return value

    def view(self, like: Op, value: Value, shape: Sequence[int], stride: Sequence[int]) -> Value:
        """The same memory under another shape."""
        old = value.type
        type_ = tensor_type(old.dtype, torch.Size(shape), tuple(stride), old.offset, old.device)
        self._id += 1
        seen = Value(self._id, type_, value.storage, value.version)
        self._add(like, aten.view.default, Kind.VIEW, (value, tuple(shape)), seen, {})
        return seen

    def _new(self, dtype: torch.dtype, shape: Sequence[int], device: torch.device) -> Value:
        self._id += 1
        self._storage += 1
        return Value(self._id, contiguous(dtype, shape, device), self._storage)

    def _add(self, like: Op, target: OpOverload, kind: Kind, args: Sequence[Any], value: Value, kwargs: dict[str, Any]) -> None:
        named, inputs = tuple(kwargs.items()), tuple(values_in((tuple(args), tuple(kwargs.values()))))
        op = Op(target, kind, tuple(args), named, inputs, Result(0), (value,), grad_enabled=like.grad_enabled, site=like.site)
        self.ops.append(op)


def contiguous(dtype: torch.dtype, shape: Sequence[int], device: torch.device) -> TensorType:
    """The type of a new tensor."""
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= max(n, 1)
    return tensor_type(dtype, torch.Size(shape), tuple(reversed(strides)), 0, device)
