"""The call without Python that was made last, and all that says that the next one may be made in the same way.

What is the same as then is compared in as few steps as there are, by identity where possible; whatever is not, goes the long
way, which finds out what it means. A step of an MLP of six parameters took 110 us of Python the long way.
"""

from typing import Any

import torch

from kitsune.ir import storage_of
from kitsune.pipeline import Pipeline, tally
from kitsune.static.asked import Asked, Knower, asks_for_gradient
from kitsune.static.moment import Moment
from kitsune.static.program import Program

# What `call` returns where something is not the same.
MISSED = object()


class Shortcut:
    """To one program, for calls whose arguments are all tensors. The program holds it, and not the other way round: its tensors
    are to die with its model."""

    def __init__(self, program: Program, call: Asked, check: Any, roots: list[Any], now: Moment, pipeline: Pipeline) -> None:
        self._key, self._check, self._n = call.key, check, len(call.tensors)
        # Where no gradients are recorded, the check of some versions of torch does not see who asks for one.
        self._asking = None if torch.is_grad_enabled() else [False] * self._n
        self._roots, self._pipeline = roots, pipeline
        self._moment = now
        self._regions = program.standing(pipeline)
        self._n_waits = 0

    def stands(self, check: Any) -> bool:
        """Does it still say how calls are made?"""
        return self._check == check and self._moment.is_now()

    def call(self, program: Program, args: tuple[Any, ...]) -> Any:
        """Make a call with these arguments, or return MISSED."""
        if not self._moment.is_now() or len(args) != self._n or not self._check(*args):
            return MISSED
        if self._asking is not None and list(map(asks_for_gradient, args)) != self._asking:
            return MISSED
        storages = [storage_of(t)._cdata for t in args]
        if len(set(storages)) != len(storages):
            return MISSED
        asked = Asked(self._key, args, args, storages, [])
        if not program.guards.hold(self._roots, asked):
            return MISSED
        numbers = program.numbers()
        if numbers is None:
            return MISSED
        if None in self._regions:
            self._n_waits += 1
            # At the 1st, 2nd, 4th, 8th call: some never become graphs.
            if not self._n_waits & (self._n_waits - 1):
                self._regions = program.standing(self._pipeline)
        else:
            self._n_waits = 0
        tally.static_skipped += 1
        return program.run(asked, numbers, self._pipeline, self._regions)


def find_shortcut(
    program: Program, call: Asked, knower: Knower, roots: list[Any], args: Any, kwargs: Any, pipeline: Pipeline
) -> bool:
    """Is there one to a program that has just been run for this call? Then it is in `program.shortcut`."""
    if kwargs or call.others or len(call.tensors) != len(args):
        return False
    check = knower.check_of(call)
    if check is None:
        return False
    known: Shortcut | None = program.shortcut
    if known is None or not known.stands(check):
        now = Moment(pipeline.device.type)
        program.shortcut = Shortcut(program, call, check, roots, now, pipeline) if now.is_plain else None
    return program.shortcut is not None
