"""cuDNN's execution plans, which each thread has to make for itself, made before a step waits for them.

A backward pass runs in autograd's own thread, and its operators leave their plans there. A region has them run in the
program's thread, where the first call of each shape takes 3 ms for a convolution and 53 ms for attention (H200, torch 2.11). And
a plan with kernels has convolutions in another layout, of which this thread has called none.
"""

import time
from contextlib import suppress
from typing import Any

import torch

from kitsune.ir import Graph, Op, TensorType, Value
from kitsune.runtime.calls import try_out

BACKWARD = frozenset({"convolution_backward", "_scaled_dot_product_cudnn_attention_backward"})
# Not attention, which may draw random numbers.
FORWARD = frozenset({"convolution"})
# Beside one step. ResNet-50 has some 50 shapes, and steps in which the host waits for the device for 27 ms (H200, unfused).
SECONDS = 0.004


class ThreadPlans:
    """What this thread has plans for."""

    def __init__(self) -> None:
        self._known: set[Any] = set()

    def make(self, graph: Graph) -> None:
        """Make those of a region that was observed: its forward has run in this thread, and its backward in another one."""
        if _captured():
            # By the program, whose graph would do this as well.
            return
        for op in graph.ops:
            if op.target._opname in BACKWARD and self._is_new(op):
                _run_once(op)
            elif op.target._opname in FORWARD:
                self._is_new(op)

    def go_on(self, graph: Graph) -> bool:
        """Make a few of those of a region that is to come; True once it has them all."""
        if _captured():
            return False
        until = time.perf_counter() + SECONDS
        for op in graph.ops:
            if (op.target._opname in BACKWARD or op.target._opname in FORWARD) and self._is_new(op):
                _run_once(op)
                if time.perf_counter() >= until:
                    return False
        return True

    def _is_new(self, op: Op) -> bool:
        key = (op.target, tuple(a.type.at_start() if type(a) is Value else a for a in op.args), op.kwargs)
        is_new = key not in self._known
        self._known.add(key)
        return is_new


def _captured() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _run_once(op: Op) -> None:
    """Each operator once per shape, on memory without content."""
    # Whatever fails, also for want of memory: only time is lost, and the call that is in the program will say what is wrong.
    with suppress(Exception):
        try_out(op, {value.id: _empty(value.type) for value in op.inputs})


def _empty(type_: TensorType) -> torch.Tensor:
    return torch.empty_strided(type_.shape, type_.stride, dtype=type_.dtype, device=type_.device)
