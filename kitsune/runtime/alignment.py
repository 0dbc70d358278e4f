"""Libraries choose another kernel, which adds up in another order, where a tensor does not begin at a multiple of 16 bytes.

So does a batch that is a slice of a larger tensor, X[i * n : (i + 1) * n], where a row is no multiple of 16 bytes. What a graph
reads in place of it begins as it did when the graph was captured, and where another batch begins otherwise the region is run in
the ordinary way, on that batch itself.

Products in 16 bits and sums, layer norms and variances in float32 gave other bits at 2, 4 and 8 bytes behind such a multiple, 450
of 6,468 calls; none did at 16 and 32, and no product in float32 and no convolution anywhere (H200, torch 2.11).
"""

from typing import Any

import torch

from kitsune.ir import Graph, Kind
from kitsune.runtime.places import Places

ALIGNMENT = 16
# Calls in which elements are added up, or drawn random numbers for, in an order that may depend on it. Of all others each element
# is worked out by itself.
_SUMMING = {Kind.GEMM, Kind.REDUCTION, Kind.WINDOW, Kind.EXTERN}
# But for these, which move elements, compare them, or have a loss for each in memory of their own before they sum.
_BY_ELEMENT = frozenset(
    "all amax amin any argmax argmin binary_cross_entropy cat constant_pad_nd embedding flip gather huber_loss index "
    "index_select max max_pool2d_with_indices min mse_loss nll_loss_forward repeat roll smooth_l1_loss sort stack topk".split()
)
_data_ptr = torch._C.TensorBase.data_ptr


def alignment(tensor: torch.Tensor) -> int:
    """How many bytes behind a multiple of ALIGNMENT a tensor begins."""
    return int(_data_ptr(tensor) % ALIGNMENT)


def summed_inputs(graph: Graph, places: Places) -> frozenset[int]:
    """The numbers of those inputs, of fractions, whose beginning may matter to the bits of what is computed."""
    found: set[int] = set()
    for op in graph.ops:
        if op.kind in _SUMMING and op.target._opname not in _BY_ELEMENT:
            found.update([places.root[v.id].id for v in op.inputs if v.type.dtype.is_floating_point or v.type.dtype.is_complex])
    return frozenset(found & places.inputs)


def place_like(tensor: torch.Tensor, exactly: bool) -> torch.Tensor:
    """New memory for a tensor of these strides; if `exactly`, it begins as many bytes behind a multiple of ALIGNMENT."""
    like: dict[str, Any] = {"dtype": tensor.dtype, "device": tensor.device}
    behind = alignment(tensor) // tensor.itemsize if exactly else 0
    if not behind:
        return torch.empty_strided(tensor.shape, tensor.stride(), **like)
    reach = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if n)
    return torch.empty(behind + reach, **like).as_strided(tensor.shape, tensor.stride(), behind)
