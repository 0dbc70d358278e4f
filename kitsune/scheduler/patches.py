"""Convolutions of images in patches that do not overlap, as matrix products: each patch is a row, and each filter a column.

A vision transformer begins with one. Of three channels the library's kernels can make little: they pad them, in a layout of their
own. The kernel that casts the batch writes it in patches instead.
"""

import math
from typing import Any

import torch

from kitsune.ir import Graph, Kind, Op, Value
from kitsune.scheduler.cost import Costs
from kitsune.scheduler.formats import HALF, VECTOR, contiguous, results_at, with_shape
from kitsune.scheduler.passes import dead_code
from kitsune.scheduler.rewriting import Rewriting, Stuck

aten = torch.ops.aten
FORWARD, BACKWARD = aten.convolution.default, aten.convolution_backward.default


def patches_as_rows(graph: Graph, costs: Costs) -> Graph:
    """The graph with those convolutions as matrix products for which it pays."""
    rewriting = _Patches(graph)
    chosen = {n for n, op in enumerate(graph.ops) if rewriting.why_not(op) is None and costs.as_product(*_asks(op))}
    if not chosen:
        return graph
    try:
        return dead_code(rewriting.rewritten(chosen))
    except Stuck:
        return graph


def _geometry(op: Op) -> tuple[Any, ...]:
    """Stride, padding, dilation, whether it is transposed, and its groups."""
    stride, padding, dilation, transposed, _, groups = op.args[3:9] if op.target is FORWARD else op.args[4:10]
    return tuple(stride), padding, dilation, transposed, groups


def _asks(op: Op) -> tuple[float, float]:
    """Floating-point operations of a convolution, and the bytes of a copy of its image."""
    image, weight = (op.args[0], op.args[1]) if op.target is FORWARD else (op.args[1], op.args[2])
    # Each element of the image meets each filter once.
    return 2.0 * math.prod(image.type.shape) * weight.type.shape[0], 2.0 * image.type.nbytes


class _Patches(Rewriting):
    """The graph on its way. `rows` has the patches of each image, by the number of the value."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph)
        self.rows: dict[int, Value] = {}

    def why_not(self, op: Op) -> str | None:
        """Why a convolution cannot be a product of patches."""
        if op.target not in (FORWARD, BACKWARD):
            return "it is no convolution"
        image, weight = (op.args[0], op.args[1]) if op.target is FORWARD else (op.args[1], op.args[2])
        shape, size = image.type.shape, weight.type.shape
        if len(shape) != 4 or image.type.dtype not in HALF or size[1] % VECTOR == 0:
            return "the library has kernels for such images"
        stride, padding, dilation, transposed, groups = _geometry(op)
        if any(padding) or any(d != 1 for d in dilation) or transposed or groups != 1 or stride != tuple(size[2:]):
            return "its patches overlap, or have gaps"
        if any(n % k for n, k in zip(shape[2:], size[2:], strict=True)):
            return "its patches do not cover the image"
        if op.target is BACKWARD and op.args[10][0]:
            return "somebody wants the gradient of the image"
        if weight.type is not contiguous(weight.type) or image.storage in self.written:
            return "its operands are written, or lie otherwise"
        return "others can see a result" if any(v.storage in self.seen | self.written for v in op.results) else None

    def rewritten(self, chosen: set[int]) -> Graph:
        """Raises Stuck."""
        for number, op in enumerate(self.graph.ops):
            if number not in chosen:
                self.follow(op)
            elif op.target is FORWARD:
                self._forward(op)
            else:
                self._backward(op)
        return self.graph_now()

    def types(self, op: Op, now: Op) -> tuple[Any, ...] | None:
        """What is joined of fewer than four dimensions is contiguous, however its parts lie."""
        if op.target is aten.cat.default and len(op.results[0].type.shape) < 4:
            return tuple(v.type for v in op.results)
        return super().types(op, now)

    def _forward(self, op: Op) -> None:
        image, weight, bias = op.args[:3]
        rows, filters = self._in_rows(image, weight), self._filters(weight)
        (out,) = op.results
        n, channels, height, width = out.type.shape
        made = self.value(with_shape(out.type, torch.Size([n * height * width, channels])))
        turned = self.view(aten.t.default, filters)
        if bias is None:
            self.call(aten.mm.default, Kind.GEMM, made, rows, turned)
        else:
            self.call(aten.addmm.default, Kind.GEMM, made, self.stands(bias), rows, turned)
        self.name(aten.permute.default, self.view(aten.view.default, made, (n, height, width, channels)), out, (0, 3, 1, 2))

    def _backward(self, op: Op) -> None:
        grad, image, weight = op.args[:3]
        n, channels, height, width = grad.type.shape
        for k in results_at(op, (1,)):
            seen = self.view(aten.permute.default, self.stands(grad), (0, 2, 3, 1))
            if seen.type.stride != contiguous(seen.type).stride:
                seen = self.copy(seen, self.value(contiguous(seen.type)))
            seen = self.view(aten.view.default, seen, (n * height * width, channels))
            rows = self._in_rows(image, weight)
            made = self.value(with_shape(op.results[k].type, torch.Size([channels, rows.type.shape[1]])))
            self.call(aten.mm.default, Kind.GEMM, made, self.view(aten.t.default, seen), rows)
            self.name(aten.view.default, made, op.results[k], tuple(weight.type.shape))
        for k in results_at(op, (2,)):
            self.call(aten.sum.dim_IntList, Kind.REDUCTION, op.results[k], self.stands(grad), (0, 2, 3))

    def _in_rows(self, image: Value, weight: Value) -> Value:
        """The image, a row for each patch."""
        if image.id not in self.rows:
            n, channels, height, width = image.type.shape
            high, wide = weight.type.shape[2:]
            down, across = height // high, width // wide
            cut = self.view(aten.view.default, self.stands(image), (n, channels, down, high, across, wide))
            cut = self.view(aten.permute.default, cut, (0, 2, 4, 1, 3, 5))
            copied = self.copy(cut, self.value(contiguous(cut.type)))
            self.rows[image.id] = self.view(aten.view.default, copied, (n * down * across, channels * high * wide))
        return self.rows[image.id]

    def _filters(self, weight: Value) -> Value:
        return self.view(aten.view.default, self.stands(weight), (weight.type.shape[0], math.prod(weight.type.shape[1:])))
