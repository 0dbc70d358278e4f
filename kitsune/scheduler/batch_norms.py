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
from kitsune.scheduler.rectifiers import Rectifier, rectifiers

aten = torch.ops.aten
FORWARD, BACKWARD = aten.native_batch_norm.default, aten.native_batch_norm_backward.default
FP32 = torch.float32


def batch_norms(graph: Graph, why_not: Callable[[Op], str | None]) -> Graph:
    """The graph with those batch norms taken apart of which every part may be in a kernel."""
    if not any(op.target in (FORWARD, BACKWARD) for op in graph.ops):
        return graph
    b, apart = Builder(graph), set[int]()
    rectified = rectifiers(graph)
    behind = {id(found.backward): found for found in rectified.values()}
    for number, op in enumerate(graph.ops):
        start, rectifier = len(b.ops), rectified.get(number)
        # Only of a forward that is ours can its backward know the last bit.
        if id(op) in behind and id(behind[id(op)].norm) in apart:
            continue
        rectifier = rectifier if rectifier is not None and id(rectifier.norm) in apart else None
        if op.target in (FORWARD, BACKWARD) and _is_plain(op):
            _Parts(b, op, rectifier).write()
            if all(made.kind is Kind.VIEW or why_not(made) is None for made in b.ops[start:]):
                apart.add(id(op))
                continue
        b.ops[start:] = [op] if rectifier is None else [rectifier.backward, op]
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

    def __init__(self, b: Builder, op: Op, rectifier: Rectifier | None = None) -> None:
        self.b, self.op, self.arguments, self.rectifier = b, op, named(op), rectifier
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
        self._normalized(mean, invstd, arguments["weight"], arguments["bias"], out)

    def _normalized(self, mean: Value, invstd: Value, weight: Value | None, bias: Value | None, to: Value | TensorType) -> Value:
        # A product of 16 bits and float32 is float32: no wide copy is made for it.
        y = self._centred(mean)
        dtype = (to.type if isinstance(to, Value) else to).dtype
        half = dtype is not FP32
        given = [(aten.mul.Tensor, invstd), (aten.mul.Tensor, weight), (aten.add.Tensor, bias)]
        steps = [(target, operand) for target, operand in given if operand is not None]
        for k, (target, operand) in enumerate(steps):
            last = k == len(steps) - 1 and not half
            y = self._point(target, y, self._channels(operand), to=to if last else self.full)
        return self._point(aten._to_copy.default, y, to=to, dtype=dtype) if half else y

    def _passed(self, grad: Value) -> Value:
        """What a rectifier leaves of a gradient, worked out of what the norm read."""
        if self.rectifier is None:
            return grad
        start, norm = len(self.b.ops), self.rectifier.norm
        given, (out, mean, invstd) = named(norm), norm.results
        y = self._normalized(mean, invstd, given["weight"], given["bias"], out.type)
        source, _, level = self.rectifier.backward.args
        passed = self._point(aten.threshold_backward.default, source, y, level, to=grad.type)
        # Nothing of this is kept for another kernel.
        self.b.ops[start:] = [replace(made, late=made.kind is not Kind.VIEW) for made in self.b.ops[start:]]
        return passed

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
        recorded, grad = grad, self._passed(grad)
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
        grad = self._passed(recorded)
        line = self._point(aten.mul.Tensor, self.x, self._channels(slope), to=self.full)
        line = self._point(aten.add.Tensor, line, self._channels(shift), to=self.full)
        grad = self._point(aten.sub.Tensor, grad, line, to=self.full)
        half = to_input.type.dtype is not FP32
        grad = self._point(aten.mul.Tensor, grad, self._channels(scale), to=self.full if half else to_input)
        if half:
            self._point(aten._to_copy.default, grad, to=to_input, dtype=to_input.type.dtype)

    def _centred(self, mean: Value) -> Value:
        return self._point(aten.sub.Tensor, self.x, self._channels(mean), to=self.full)
