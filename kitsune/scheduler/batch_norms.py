"""Batch norm in training, taken apart: the statistics of each channel, and arithmetic that joins the kernels around it.

Nothing as large as the images is kept between the parts but what eager keeps.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from kitsune.ir import Effects, Graph, Kind, Op, Operand, TensorType, Value, named, tensor_type
from kitsune.scheduler.build import Builder
from kitsune.scheduler.formats import is_dense

aten = torch.ops.aten
FORWARD, BACKWARD = aten.native_batch_norm.default, aten.native_batch_norm_backward.default
FP32 = torch.float32


def batch_norms(graph: Graph, why_not: Callable[[Op], str | None]) -> Graph:
    """The graph with those batch norms taken apart of which every part may be in a kernel."""
    if not any(op.target in (FORWARD, BACKWARD) for op in graph.ops):
        return graph
    b = Builder(graph)
    for op in graph.ops:
        start = len(b.ops)
        if op.target not in (FORWARD, BACKWARD) or not _is_plain(op):
            b.ops.append(op)
            continue
        _Parts(b, op).write()
        if any(made.kind is not Kind.VIEW and why_not(made) is not None for made in b.ops[start:]):
            b.ops[start:] = [op]
    return Graph(graph.inputs, tuple(b.ops), graph.outputs)


def _is_plain(op: Op) -> bool:
    """In training, with weights and statistics in float32, of a tensor without gaps."""
    arguments = named(op)
    x = arguments["input"].type
    others = [arguments[name] for name in ("weight", "bias", "running_mean", "running_var", "save_mean") if name in arguments]
    training = arguments["training"] if op.target is FORWARD else arguments["train"]
    if not training or len(x.shape) < 2 or x.shape.numel() <= x.shape[1] or not is_dense(x) or x.dtype is torch.float64:
        return False
    if op.target is BACKWARD and (len(op.results) != 3 or arguments["weight"] is None):
        return False
    return all(v is None or v.type.dtype is FP32 for v in others) and all(v.type.canonical for v in op.results[1:])


class _Parts:
    """One batch norm on its way."""

    def __init__(self, b: Builder, op: Op) -> None:
        self.b, self.op, self.arguments = b, op, named(op)
        self.x: Value = self.arguments["input"]
        shape = tuple(self.x.type.shape)
        self.dims = (0, *range(2, len(shape)))
        self.channel = (FP32, (shape[1],))
        self.n = self.x.type.shape.numel() // shape[1]
        self.along = (1, shape[1], *(1 for _ in shape[2:]))
        self.full = self._of(FP32)

    def _of(self, dtype: torch.dtype) -> TensorType:
        type_ = self.x.type
        return tensor_type(dtype, type_.shape, type_.stride, 0, type_.device)

    def write(self) -> None:
        """Put the parts in its place."""
        if self.op.target is FORWARD:
            self._forward()
        else:
            self._backward()

    def _point(self, target: Any, *args: Any, to: Any, **kwargs: Any) -> Value:
        return self.b.call(self.op, target, Kind.POINTWISE, args, to, **kwargs)

    def _channels(self, value: Value) -> Value:
        """A number for each channel, seen along them."""
        n = self.along[1]
        return self.b.view(self.op, value, self.along, (n, *(1 for _ in self.along[1:])))

    def _rounded(self, value: Value, result: Value) -> None:
        """The last step: what was worked out so far, in the type of the result."""
        self._point(aten._to_copy.default, value, to=result, dtype=result.type.dtype)

    def _forward(self) -> None:
        arguments, (out, mean, invstd) = self.arguments, self.op.results
        wide = self.x
        if wide.type.dtype is not FP32:
            wide = self._point(aten._to_copy.default, wide, to=self.full, dtype=FP32)
        made = (self.channel, mean)
        keys = {"correction": 0, "keepdim": False}
        variance, _ = self.b.calls(self.op, aten.var_mean.correction, Kind.REDUCTION, (wide, self.dims), made, **keys)
        shifted = self._point(aten.add.Tensor, variance, arguments["eps"], to=self.channel)
        self._point(aten.rsqrt.default, shifted, to=invstd)
        unbiased = self._point(aten.mul.Tensor, variance, self.n / (self.n - 1), to=self.channel)
        self._follow(arguments["running_mean"], mean)
        self._follow(arguments["running_var"], unbiased)
        # A product of 16 bits and float32 is float32: no wide copy is made for it.
        y = self._point(aten.sub.Tensor, self.x, self._channels(mean), to=self.full)
        half = out.type.dtype is not FP32
        steps = [(aten.mul.Tensor, invstd), (aten.mul.Tensor, arguments["weight"]), (aten.add.Tensor, arguments["bias"])]
        steps = [(target, operand) for target, operand in steps if operand is not None]
        for k, (target, operand) in enumerate(steps):
            last = k == len(steps) - 1 and not half
            y = self._point(target, y, self._channels(operand), to=out if last else self.full)
        if half:
            self._rounded(y, out)

    def _follow(self, running: Value | None, now: Value) -> None:
        """A running statistic takes a step towards that of this batch."""
        for before, after in self.op.rewritten:
            if running is not None and before is running:
                args = (running, now, self.arguments["momentum"])
                effects = Effects((after.storage,))
                pairs = ((before, after),)
                op = Op(aten.lerp_.Scalar, Kind.POINTWISE, args, (), (running, now), Operand(0), (), pairs, effects)
                self.b.add(replace(op, site=self.op.site, grad_enabled=self.op.grad_enabled))

    def _backward(self) -> None:
        arguments, (to_input, to_weight, to_bias) = self.arguments, self.op.results
        grad, mean, invstd = arguments["grad_out"], arguments["save_mean"], arguments["save_invstd"]
        product = self._point(aten.mul.Tensor, self._centred(mean), grad, to=self.full)
        sums = aten.sum.dim_IntList
        along = self.b.call(self.op, sums, Kind.REDUCTION, (product, self.dims), self.channel)
        self.b.call(self.op, sums, Kind.REDUCTION, (grad, self.dims), to_bias, dtype=FP32)
        self._point(aten.mul.Tensor, along, invstd, to=to_weight)
        slope = self._point(aten.mul.Tensor, to_weight, invstd, to=self.channel)
        slope = self._point(aten.mul.Tensor, slope, 1 / self.n, to=self.channel)
        level = self._point(aten.mul.Tensor, to_bias, 1 / self.n, to=self.channel)
        scale = self._point(aten.mul.Tensor, invstd, arguments["weight"], to=self.channel)
        # The gradient less its mean and what goes along with x, as one line in x: both sums are then read by one kernel.
        shift = self._point(aten.mul.Tensor, mean, slope, to=self.channel)
        shift = self._point(aten.sub.Tensor, level, shift, to=self.channel)
        line = self._point(aten.mul.Tensor, self.x, self._channels(slope), to=self.full)
        line = self._point(aten.add.Tensor, line, self._channels(shift), to=self.full)
        grad = self._point(aten.sub.Tensor, grad, line, to=self.full)
        half = to_input.type.dtype is not FP32
        grad = self._point(aten.mul.Tensor, grad, self._channels(scale), to=self.full if half else to_input)
        if half:
            self._rounded(grad, to_input)

    def _centred(self, mean: Value) -> Value:
        return self._point(aten.sub.Tensor, self.x, self._channels(mean), to=self.full)
