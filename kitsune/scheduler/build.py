"""New ops for a pass that puts several in the place of one."""

from collections.abc import Sequence
from typing import Any

import torch
from torch._ops import OpOverload

from kitsune.ir import Graph, Kind, Op, Result, TensorType, Value, n_values, tensor_type, values_in
from kitsune.scheduler.formats import contiguous

aten = torch.ops.aten
# What an op makes: a Value that is known already, a type, or a contiguous tensor of a dtype and a shape.
Made = Value | TensorType | tuple[torch.dtype, Sequence[int]]


class Builder:
    """The ops of a graph that is being rewritten, in order. What it makes has numbers that the graph does not use."""

    def __init__(self, graph: Graph) -> None:
        values = [*graph.inputs, *(v for op in graph.ops for v in op.outputs)]
        self.ops: list[Op] = []
        # Those of them that were not recorded.
        self.made: list[Op] = []
        self._id = n_values(graph) - 1
        self._storage = max((v.storage for v in values), default=-1)

    def call(
        self,
        like: Op,
        target: OpOverload,
        kind: Kind,
        args: Sequence[Any],
        result: Made,
        **kwargs: Any,
    ) -> Value:
        """An op with one new tensor: a Value that is known already, one of a type, or a contiguous one of a dtype and a shape."""
        return self.calls(like, target, kind, args, (result,), **kwargs)[0]

    def calls(
        self, like: Op, target: OpOverload, kind: Kind, args: Sequence[Any], results: Sequence[Made], **kwargs: Any
    ) -> tuple[Value, ...]:
        """The same with several."""
        values = tuple(self._new(made, like.results[0].type.device) for made in results)
        self._add(like, target, kind, args, values, kwargs)
        return values

    def view(self, like: Op, value: Value, shape: Sequence[int], stride: Sequence[int]) -> Value:
        """The same memory under another shape."""
        old = value.type
        type_ = tensor_type(old.dtype, torch.Size(shape), tuple(stride), old.offset, old.device)
        self._id += 1
        seen = Value(self._id, type_, value.storage, value.version)
        self._add(like, aten.view.default, Kind.VIEW, (value, tuple(shape)), (seen,), {})
        return seen

    def _new(self, made: Made, device: torch.device) -> Value:
        if isinstance(made, Value):
            return made
        if isinstance(made, tuple):
            size = torch.Size(made[1])
            made = contiguous(tensor_type(made[0], size, (0,) * len(size), 0, device))
        self._id += 1
        self._storage += 1
        return Value(self._id, made, self._storage)

    def _add(
        self,
        like: Op,
        target: OpOverload,
        kind: Kind,
        args: Sequence[Any],
        values: tuple[Value, ...],
        kwargs: dict[str, Any],
    ) -> None:
        named, inputs = tuple(kwargs.items()), tuple(values_in((tuple(args), tuple(kwargs.values()))))
        structure: Any = Result(0) if len(values) == 1 else tuple(Result(k) for k in range(len(values)))
        told: dict[str, Any] = {"grad_enabled": like.grad_enabled, "site": like.site, "derived": kind is Kind.VIEW}
        self.add(Op(target, kind, tuple(args), named, inputs, structure, values, **told))

    def add(self, op: Op) -> None:
        """Put an op that is new, or reads what is new."""
        self.ops.append(op)
        self.made.append(op)
