"""Where a backward's numbers come from: from nowhere, or from numbers of the forward, which may move from step to step."""

from collections.abc import Sequence
from math import copysign
from operator import is_
from typing import Any


def same(a: float, b: float) -> bool:
    """Are these the same number, down to the sign of zero?"""
    return (a == b and (a != 0 or copysign(1, a) == copysign(1, b))) or (a != a and b != b)


def kind_of(number: float) -> str:
    """What a function may look at to do something else, as dropout with 0.0 does: another kind is another call."""
    if number in (0, 1):
        return repr(number)
    return "more" if number > 0 else "less" if number < 0 else "nan"


class ScalarSources:
    """What is known of the numbers `made` by a backward, given the numbers `before` it in its region.

    Each sight narrows down which number before it a number may be, or be the negative of. A number that no change has moved is
    a constant. Only of those that have been seen to move is it known what moves with them.
    """

    def __init__(self, before: Sequence[float], made: Sequence[float]) -> None:
        self._before, self._made = tuple(before), tuple(made)
        # (position, sign) of every number that each may be; None for a constant.
        self._sources: list[set[tuple[int, int]] | None] = [None] * len(self._made)
        self._moved: set[int] = set()
        self._unexplained = False
        # The distinct places that numbers come from, and which of them each number comes from.
        self._plan: tuple[list[Any], list[int]] | None = None
        # The very numbers that were asked about last, and what was said: objects that are the same need no comparing.
        self._asked: tuple[float, ...] | None = None
        self._said: Sequence[float] | None = None

    def see(self, before: Sequence[float], made: Sequence[float]) -> None:
        """It was made again."""
        self._plan = self._asked = None
        changed = {i for i, (a, b) in enumerate(zip(self._before, before, strict=True)) if not same(a, b)}
        for j, (old, new) in enumerate(zip(self._made, made, strict=True)):
            sources = self._sources[j]
            if sources is None and not same(old, new):
                every = ((i, sign) for i in changed for sign in (1, -1))
                sources = {(i, sign) for i, sign in every if same(sign * self._before[i], old)}
            if sources is not None:
                sources = {(i, sign) for i, sign in sources if same(sign * before[i], new)}
                self._unexplained = self._unexplained or not sources
            self._sources[j] = sources
        self._moved |= changed
        self._before, self._made = tuple(before), tuple(made)

    @property
    def unexplained(self) -> int | None:
        """The first number that has moved and is none of those before it; None if there is none."""
        return next((j for j, sources in enumerate(self._sources) if sources is not None and not sources), None)

    def numbers(self, before: Sequence[float]) -> Sequence[float] | None:
        """What a call makes after these numbers; None if that is not known."""
        if self._asked is None or len(self._asked) != len(before) or not all(map(is_, before, self._asked)):
            self._asked, self._said = tuple(before), self._numbers(before)
        return self._said

    def _numbers(self, before: Sequence[float]) -> Sequence[float] | None:
        changed = {i for i, (a, b) in enumerate(zip(self._before, before, strict=True)) if not same(a, b)}
        if not changed:
            return self._made
        if self._unexplained or not changed <= self._moved:
            return None
        if self._plan is None:
            # Of a list's 200 numbers most come from the same place.
            pairs = zip(self._sources, self._made, strict=True)
            kinds = [(None, made.hex()) if sources is None else (frozenset(sources), "") for sources, made in pairs]
            distinct = list(dict.fromkeys(kinds))
            self._plan = distinct, [distinct.index(kind) for kind in kinds]
        distinct, places = self._plan
        found = []
        for sources, constant in distinct:
            values = [float.fromhex(constant)] if sources is None else [sign * before[i] for i, sign in sources]
            if not all(same(values[0], value) for value in values):
                return None
            found.append(values[0])
        return [found[k] for k in places]
