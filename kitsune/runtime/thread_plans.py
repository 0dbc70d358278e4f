"""cuDNN's execution plans, which each thread has to make for itself, made before a step waits for them.

A backward pass runs in autograd's own thread, and its operators leave their plans there. A region has them run in the
program's thread, where the first call of each shape takes 3 ms for a convolution and 53 ms for attention (H200, torch 2.11).
"""

from typing import Any

import torch

from kitsune.ir import Graph, Op, TensorType, Value
from kitsune.runtime.calls import call

KEPT_PER_THREAD = frozenset({"convolution_backward", "_scaled_dot_product_cudnn_attention_backward"})


class ThreadPlans:
    """What this thread has plans for."""

    def __init__(self) -> None:
        self._known: set[Any] = set()

    def make(self, graph: Graph) -> None:
        """Run each operator of a region that needs a plan once per shape, on memory without content."""
        for op in graph.ops:
            if op.target._opname in KEPT_PER_THREAD:
                key = (op.target, tuple(a.type.at_start() if type(a) is Value else a for a in op.args), op.kwargs)
                if key not in self._known:
                    self._known.add(key)
                    _run_once(op)


def _run_once(op: Op) -> None:
    values: Any = {value.id: _empty(value.type) for value in op.inputs}
    try:
        call(op, values, [])
    except RuntimeError:
        # Also for want of memory. Nothing but time is lost: the call that is in the program will say what is wrong.
        return


def _empty(type_: TensorType) -> torch.Tensor:
    return torch.empty_strided(type_.shape, type_.stride, dtype=type_.dtype, device=type_.device)
