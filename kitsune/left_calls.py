"""Calls of a decorated function that the gate has left to eager: they are made without a context.

One added 95 us to a step of 2.2 ms (H200, `python -m benchmarks.bench_batch_sizes`): behind a step its code and data are cold.
"""

import threading
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

from kitsune.contexts import here, is_left
from kitsune.pipeline import Pipeline

T = TypeVar("T")

# Calls without a context, after which one has one all the same: the function may have come to take other steps, and those of
# another optimizer may be another program.
UNSEEN = 64


class LeftCalls(threading.local):
    """What one decorated function does in a thread, as its calls in contexts have told.

    Only where each took no step, or each took one, is it known without a context what a call is to the gate.
    """

    def __init__(self) -> None:
        self._pipeline: Pipeline | None = None
        self._is_even, self._n_steps, self._n_unseen = True, 0, 0
        self._optimizer: weakref.ref[Any] | None = None

    def seen(self, pipeline: Pipeline) -> None:
        """A call was made in a context of its own."""
        n, known = here.n_steps, self._pipeline is pipeline
        self._is_even = n < 2 and (not known or (self._is_even and n == self._n_steps))
        self._pipeline, self._n_steps, self._n_unseen, self._optimizer = pipeline, n, 0, here.stepped

    def may_be_left(self, pipeline: Pipeline) -> bool:
        """May the next call go without a context? That is left to eager anyway."""
        if here.in_left_call:
            # It is a part of one.
            return True
        if self._pipeline is not pipeline or not self._is_even or self._n_unseen >= UNSEEN:
            return False
        return self._optimizer is None or self._optimizer() is not None

    def make(self, pipeline: Pipeline, fn: Callable[..., T], args: Any, kwargs: Any) -> T:
        """The next call, of which the gate is told what a context would tell."""
        if here.in_left_call:
            return fn(*args, **kwargs)
        n_opened = here.n_opened
        try:
            try:
                here.in_left_call = True
                returned = fn(*args, **kwargs)
            finally:
                here.in_left_call = False
        finally:
            # An interrupt may have come at that line.
            here.in_left_call = False
        self._n_unseen += 1
        # A reset, or a stance, may have come.
        if is_left(pipeline):
            if self._optimizer is None:
                pipeline.gate.end_of_context()
            elif here.n_opened == n_opened and (optimizer := self._optimizer()) is not None:
                # A context that was opened inside has told of its steps already.
                pipeline.gate.end_of_step(optimizer)
        return returned
