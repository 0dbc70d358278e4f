"""A region that is replayed as a CUDA graph, for those who run it again and again: looked up once, and not at each run."""

from collections.abc import Collection
from typing import Any

import torch

from kitsune.config import config
from kitsune.ir import Graph
from kitsune.ready import Ready
from kitsune.running import Runner
from kitsune.runtime import Captured, Steady

_data_ptr = torch._C.TensorBase.data_ptr


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

    def replay(self, values: list[Any], scalars: tuple[float, ...]) -> bool:
        """Replay, below autograd. False if the runner has to be asked, since something is not as usual: nothing has happened."""
        captured, region, steady = self._captured, self._region, self._steady
        if region.captured is not captured or not steady.recorder.follow_stream():
            return False
        for number, address in self._unsure:
            if _data_ptr(values[number]) != address:
                return False
        n_replays = captured.n_replays
        try:
            captured.again(values, scalars)
        except Exception:
            if captured.n_replays != n_replays:
                raise
            # The runner will meet it again, and says what there is to say.
            return False
        steady.was_replayed(region)
        ready = self._ready
        self._runner.tally.ran(ready.n_ops, ready.n_dead, ready.plan)
        return True


def standing(runner: Runner, graph: Graph, values: list[Any], sure: Collection[int]) -> Standing | None:
    """A region that was replayed at its last run, and has nothing else coming; None for any other. `values` has the inputs
    that are `sure`."""
    ready = runner.ready.get(runner.key(graph))
    if ready is None or ready.steady is None or ready.views:
        return None
    if ready.waits or ready.coming is not None or ready.kept is not None:
        return None
    captured = ready.steady.captured
    if captured is None or captured.has_tail or not runner.options.captures or not config.pool:
        return None
    where = captured.fixed()
    if any(_data_ptr(values[number]) != where[number] for number in sure if number in where):
        return None
    return Standing(runner, ready, ready.steady, captured, sure)
