"""What the moving numbers of a call follow from: its optimizers' hyperparameters, and the steps that those count on the host.

An update is given floats that are, or follow, the hyperparameters; from these and the steps so far it works out what its regions
are then told. Each of the two ways is learned from what was seen to move with what.
"""

from collections.abc import Sequence

from kitsune.lazy import ScalarSources, numbers_of, read_steps
from kitsune.static.record import Counted, Record


class Foretelling:
    """Of one record, and of those that were seen to do the same since."""

    def __init__(self, record: Record) -> None:
        self._counted = record.counted
        self._options = ScalarSources(record.numbers, _options(record))
        self._sources = ScalarSources(_known(record), record.scalars)
        # The hyperparameters that were asked about last, and what was said: where no steps are counted it stays so.
        self._asked: Sequence[float] | None = None
        self._said: Sequence[float] | None = None

    def see(self, record: Record) -> None:
        """A call has done the same again."""
        self._options.see(record.numbers, _options(record))
        self._sources.see(_known(record), record.scalars)
        self._asked = None

    @property
    def unexplained(self) -> int | None:
        """The first number that has moved and follows from nothing that is known; None if there is none."""
        return self._sources.unexplained

    def next(self, hyperparameters: Sequence[float]) -> Sequence[float] | None:
        """The numbers of the next call; None if what they come from has not been seen to move so far."""
        if self._counted:
            steps = []
            for it in self._counted:
                now, pattern = read_steps(it.tensors)
                if pattern != it.pattern:
                    return None
                steps.append(now)
            return self._numbers(hyperparameters, steps)
        if self._asked is not hyperparameters:
            self._asked, self._said = hyperparameters, self._sources.numbers(hyperparameters)
        return self._said

    def of(self, record: Record) -> Sequence[float] | None:
        """The numbers that were to be expected of a call that has been made; None if that cannot be said."""
        return self._numbers(record.numbers, [it.steps for it in record.counted])

    def _numbers(self, hyperparameters: Sequence[float], steps: list[list[float]]) -> Sequence[float] | None:
        options = self._options.numbers(hyperparameters)
        if options is None:
            return None
        known, rest = list(hyperparameters), list(options)
        for it, now in zip(self._counted, steps, strict=True):
            found = _worked_out(it, now, dict(zip(it.floats, rest, strict=False)))
            if found is None:
                return None
            known += found
            del rest[: len(it.floats)]
        return self._sources.numbers(known)


def _options(record: Record) -> list[float]:
    """The floats that the updates of a call are given."""
    return [number for it in record.counted for number in it.floats.values()]


def _known(record: Record) -> list[float]:
    """What the moving numbers of a call may be: a hyperparameter, or worked out by an update."""
    known = list(record.numbers)
    for it in record.counted:
        found = _worked_out(it, it.steps, it.floats)
        assert found is not None
        known += found
    return known


def _worked_out(it: Counted, steps: list[float], floats: dict[str, float]) -> list[float] | None:
    return numbers_of(it.name, [step + it.earlier for step in steps], {**dict(it.others), **floats})
