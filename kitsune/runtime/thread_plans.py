"""cuDNN's execution plans, which each thread has to make for itself, made before a step waits for them.

A backward pass runs in autograd's own thread, and its operators leave their plans there. A region has them run by the program's
thread, in which the first call of each shape takes 3 ms for a convolution and 53 ms for attention (H200, torch 2.11); or, where
it will be captured, by a thread that has made them meanwhile (`plan_thread.py`). And a plan with kernels has convolutions in
another layout, of which none of them has called any.
"""

import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from typing import Any

import torch

from kitsune.ir import BACKWARDS_WITH_PLANS, FORWARDS_WITH_PLANS, WITH_PLANS, Graph, Op, TensorType, streams
from kitsune.runtime.calls import try_out
from kitsune.runtime.plan_thread import key_of, plan_thread

# Beside one step, to begin with; then TIMES as long as the step took without, and so long at the most. ResNet-50 has 46 of them
# for its plan, which take 0.3 s, in steps of 36 ms with 9 ms of Python (H200, unfused): 24 ms of the rest can go into these.
SECONDS, TIMES, MOST = 0.004, 2, 0.025
# Of the memory that an operator's tensors take, what has to be free if it is run beside the program.
ROOM = 4


class ThreadPlans:
    """What the thread that makes this has plans for. With `hands_over`, what it has none for is run in another one."""

    def __init__(self, hands_over: bool = False) -> None:
        self._thread, self._hands_over = threading.get_ident(), hands_over
        self._known: set[Any] = set()
        if hands_over:
            plan_thread.start()
        # Bytes that were free when it was last asked, in the region that is observed.
        self._n_free = 0
        # When the last ones were made.
        self._ended: float | None = None

    def seen(self, op: Op) -> None:
        """An operator that leaves a plan has run in this very thread, which may be autograd's."""
        if threading.get_ident() == self._thread:
            self._is_new(op)
        elif self._hands_over and not self._knows(op) and not streams.is_captured() and self._has_room(op):
            plan_thread.learn(op, partial(_run, op))

    def foresee(self, ops: Iterable[Op]) -> None:
        """Have those of operators made that the program's last run has needed, beside its first step, while the device has little
        to do: ResNet-50's 46 take 0.47 s then, and 0.78 and 0.3 beside steps that are replayed, where what the library loads
        waits for a replay to end (33 ms, H200). Not where the library tries which of its kernels is the fastest: it would do so
        beside the trials of the step itself."""
        if not self._hands_over or streams.is_captured() or torch.backends.cudnn.benchmark:
            return
        for op in ops:
            if not self._knows(op) and self._has_room(op):
                plan_thread.learn(op, partial(_run, op), is_spare=True)

    def make(self, graph: Graph) -> None:
        """Make those of a region that was observed: its forward has run in this thread, and its backward in another one."""
        self._n_free = 0
        # Beside the steps to come each would take as long as they do, and keep them waiting.
        plan_thread.spare_nothing()
        if streams.is_captured():
            # By the program, whose graph would do this as well.
            return
        for op in graph.ops:
            if op.target._opname in BACKWARDS_WITH_PLANS and self._is_new(op):
                _run_once(op)
            elif op.target._opname in FORWARDS_WITH_PLANS:
                self._is_new(op)

    def needed(self, graph: Graph) -> list[Op]:
        """Of a region that is to come, those that this thread has no plans for, each shape once. The background asks, and has run
        each of them once then: what is loaded for the first of a kind is there for all threads. Two of ResNet-50's 46 take 60 to
        90 ms for it, and 9 at the most in this thread afterwards; steps of 33 ms take up to 38 beside that (H200)."""
        ops = {key_of(op): op for op in graph.ops if op.target._opname in WITH_PLANS}
        new = {key: op for key, op in ops.items() if not self._knows(op)}
        for op in () if streams.is_captured() else new.values():
            _run_once(op)
        return list(new.values())

    def go_on(self, ops: list[Op]) -> None:
        """Make the plans of a few of these, which are taken off the list."""
        if streams.is_captured():
            return
        now = time.perf_counter()
        until = now + (SECONDS if self._ended is None else min(TIMES * (now - self._ended), MOST))
        while ops and now < until:
            if self._is_new(op := ops.pop(0)):
                _run_once(op)
            now = time.perf_counter()
        self._ended = now

    def make_all(self, ops: list[Op]) -> None:
        """Make the plans of all of these now."""
        if not streams.is_captured():
            for op in filter(self._is_new, ops):
                _run_once(op)

    def _has_room(self, op: Op) -> bool:
        """Is there memory to run it once more beside the program's own step?"""
        device = op.inputs[0].type.device
        n_needed = ROOM * sum(value.type.extent_bytes for value in (*op.inputs, *op.results))
        if n_needed > self._n_free and device.type == "cuda":
            self._n_free, _ = torch.cuda.mem_get_info(device)
        return n_needed <= self._n_free or device.type != "cuda"

    def _knows(self, op: Op) -> bool:
        """Is there a plan for it, here or where it is handed over to?"""
        return key_of(op) in self._known or plan_thread.knows(op)

    def _is_new(self, op: Op) -> bool:
        """Is there none? From now on there is one here."""
        is_new = not self._knows(op)
        if is_new:
            self._known.add(key_of(op))
        return is_new


def _run_once(op: Op) -> None:
    # Whatever fails, also for want of memory: only time is lost, and the call that is in the program will say what is wrong.
    with suppress(Exception):
        _run(op)


def _run(op: Op) -> None:
    """Each operator once per shape, on memory without content."""
    try_out(op, {value.id: _empty(value.type) for value in op.inputs})


def _empty(type_: TensorType) -> torch.Tensor:
    return torch.empty_strided(type_.shape, type_.stride, dtype=type_.dtype, device=type_.device)
