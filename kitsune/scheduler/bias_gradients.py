"""The gradient of a convolution's bias as what it is: a sum over all pixels, which may be in a kernel with others.

The library's convolutions leave it to torch's general sum, which takes 22 us each for the two of LeNet on an H200.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from kitsune.ir import Graph, Kind, Op, Result
from kitsune.scheduler.build import Builder
from kitsune.scheduler.formats import results_at

aten = torch.ops.aten


def bias_gradients(graph: Graph, why_not: Callable[[Op], str | None]) -> Graph:
    """The graph with those sums as ops of their own that may be in kernels."""
    if not any(op.target is aten.convolution_backward.default for op in graph.ops):
        return graph
    b = Builder(graph)
    for op in graph.ops:
        start = len(b.ops)
        bias = results_at(op, (2,)) if op.target is aten.convolution_backward.default else []
        if not bias:
            b.ops.append(op)
            continue
        grad = op.args[0]
        dims = (0, *range(2, len(grad.type.shape)))
        b.call(op, aten.sum.dim_IntList, Kind.REDUCTION, (grad, dims), op.results[bias[0]])
        if why_not(b.ops[-1]) is not None:
            b.ops[start:] = [op]
        elif len(op.results) > 1:
            b.add(_without_bias(op))
    return Graph(graph.inputs, tuple(b.ops), graph.outputs)


def _without_bias(op: Op) -> Op:
    """The same for the other gradients; that of the bias is the last result."""
    args = (*op.args[:-1], (*op.args[-1][:2], False))
    structure = tuple(part if isinstance(part, Result) and k < 2 else None for k, part in enumerate(op.structure))
    return replace(op, args=args, structure=structure, results=op.results[:-1])
