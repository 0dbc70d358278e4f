"""A region that is replayed as a CUDA graph, for those who run it again and again: looked up once, and not at each run."""

from collections.abc import Collection, Sequence
from operator import is_
from typing import Any

import torch

from kitsune.config import config
from kitsune.dispatch import below_autograd
from kitsune.ir import Graph
from kitsune.ready import Ready
from kitsune.running import Runner
from kitsune.runtime import Captured, Steady, adopt_views, numeric_settings

_data_ptr = torch._C.TensorBase.data_ptr
# Graphs that a thread has a short way to; a program with more of them than this goes the long way.
MAX_REPLAYS = 64


class Standing:
    """A captured region as its runner would replay it now. It stands while knobs and torch's numeric settings are what they
    are, which whoever holds it has to look at; whether the graph is still there, `replay` sees itself.

    `sure` are the inputs that whoever holds it knows to be where they were.
    """

    def __init__(self, runner: Runner, ready: Ready, region: Steady, captured: Captured, sure: Collection[int]) -> None:
        assert runner.steady is not None
        self._runner, self._ready, self._steady = runner, ready, runner.steady
        self._region, self._captured = region, captured
        self._unsure = [(number, address) for number, address in captured.fixed().items() if number not in sure]
        self._knows_some = bool(sure)
        # Is no other tile to be tried after a replay?
        is_tried = ready.subject is not None and ready.subject.is_over
        self.answers = captured.answers
        self.is_settled = runner.tuner is None or config.tuning != "on" or ready.plan is None or is_tried

    def replay(self, values: list[Any], scalars: tuple[float, ...]) -> bool:
        """Replay, beneath all modes of Python. False if the runner has to be asked, since something is not as usual: nothing has
        happened."""
        if self._captured.is_bare:
            return self._replay(values, scalars)
        with below_autograd():
            return self._replay(values, scalars)

    def _replay(self, values: list[Any], scalars: tuple[float, ...]) -> bool:
        captured, region, steady = self._captured, self._region, self._steady
        if region.captured is not captured or self._ready.coming is not None or not steady.recorder.follow_stream():
            return False
        if not self._knows_some:
            if not captured.fits(values):
                return False
        elif self._unsure and any(_data_ptr(values[number]) != address for number, address in self._unsure):
            return False
        n_replays = captured.n_replays
        try:
            captured.again(values, scalars)
        except Exception:
            if captured.n_replays != n_replays:
                raise
            # The runner will meet it again, and says what there is to say.
            return False
        ready = self._ready
        adopt_views(ready.views, values)
        steady.was_replayed(region)
        self._runner.tally.ran(ready.n_ops, ready.n_dead, ready.plan)
        return True


def standing(runner: Runner, graph: Graph, values: list[Any], sure: Collection[int]) -> Standing | None:
    """A region that was replayed at its last run, and has nothing else coming; None for any other. `values` has the inputs
    that are `sure`."""
    ready = runner.ready.get(runner.key(graph))
    if ready is None or ready.steady is None:
        return None
    if ready.waits or ready.coming is not None:
        return None
    captured = ready.steady.captured
    if captured is None or captured.has_tail or not runner.options.captures or not config.pool:
        return None
    where = captured.fixed()
    if any(_data_ptr(values[number]) != where[number] for number in sure if number in where):
        return None
    return Standing(runner, ready, ready.steady, captured, sure)


class Replays:
    """The regions of a runner that are replayed step after step, and need nothing of what `Runner.run` does around a replay."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        # What held when each stood, and its numbers at the last replay: the same tuple again is the same numbers.
        self._known: dict[Graph, tuple[Any, Standing, tuple[float, ...]]] = {}

    def replay(self, graph: Graph, values: list[Any], scalars: Sequence[float]) -> Standing | None:
        """The same as `Standing.replay`. None if the region has to be run at length: nothing has happened."""
        known = self._known.get(graph)
        if known is None:
            return None
        stamp, region, numbers = known
        if stamp != _stamp() or torch.is_inference_mode_enabled():
            del self._known[graph]
            return None
        if len(numbers) != len(scalars) or not all(map(is_, numbers, scalars)):
            numbers = tuple(scalars)
            self._known[graph] = stamp, region, numbers
        if region.replay(values, numbers):
            return region
        del self._known[graph]
        return None

    def learn(self, graph: Graph) -> None:
        """A region has been run at length: is it to be replayed from now on?"""
        region = None if config.check else standing(self._runner, graph, [], ())
        if region is not None and region.is_settled:
            if len(self._known) >= MAX_REPLAYS:
                self._known.clear()
            self._known[graph] = _stamp(), region, ()

    def forget(self) -> None:
        """Drop every region."""
        self._known.clear()


def _stamp() -> tuple[Any, ...]:
    return config.n_changes, numeric_settings()
