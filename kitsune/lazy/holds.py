"""What the program holds of what calls have made whose graph is owed, told by counts of references where it was found out before.

To find it out, the calls are taken apart (`leave_results`): 1.0 ms of BERT's 314 calls (CPU host), before a graph can start.
Behind the same calls it is the same as then if everything they have made is referred to as often, and they refer to the same
themselves.
"""

from collections.abc import Iterator
from itertools import chain
from operator import itemgetter
from sys import getrefcount
from typing import Any

from kitsune.lazy.tensor import LazyTensor
from kitsune.lazy.used_again import counts_of

# Of calls as `Followed` has them.
_flat, _made = itemgetter(3), itemgetter(4)
# References to what is in one place and in the list that is asked about.
_somewhere: tuple[Any, ...] = ([],)
(_ALONE,) = map(getrefcount, [_somewhere[0]])


class Holds:
    """How what these calls have made was held, which nothing has been taken from; `found` is told what has come of that.

    `is_sure` is whether it can be told by counts: nobody else may refer to the tuples and lists that the calls were given.
    """

    def __init__(self, calls: list[Any]) -> None:
        wrappers = _wrappers(calls)
        # Something else stands in calls that were taken apart at the cut before.
        is_whole = {*map(type, wrappers)} == {LazyTensor}
        self._counts, self._pattern = counts_of(wrappers if is_whole else []), _pattern(calls, wrappers)
        n_given = [sum(type(t) is LazyTensor for t in call[3]) for call in calls]
        by_place = [sum(type(a) is LazyTensor for a in call[1]) for call in calls]
        self._plain = [k for k, n in enumerate(n_given) if n and n == by_place[k]]
        # Calls that are given some of it by name, or in a list.
        self._deep = [k for k, n in enumerate(n_given) if n != by_place[k]]
        self.is_sure = is_whole and self._are_alone(calls)
        self._left: list[int] = []

    def found(self, calls: list[Any]) -> None:
        """The calls have been taken apart: of what nobody held, something else stands in them."""
        self._left = [k for k, t in enumerate(_wrappers(calls)) if type(t) is not LazyTensor]

    def left_again(self, calls: list[Any]) -> list[Any] | None:
        """What nobody holds of what these calls have made, if all is held as then; else None."""
        wrappers = _wrappers(calls)
        if {*map(type, wrappers)} != {LazyTensor} or counts_of(wrappers) != self._counts:
            return None
        if _pattern(calls, wrappers) != self._pattern:
            return None
        return [wrappers[k] for k in self._left] if self._are_alone(calls) else None

    def _are_alone(self, calls: list[Any]) -> bool:
        """Do only these calls refer to what they were given tensors in, each to its own?"""
        holders = [calls[k][1] for k in self._plain]
        for k in self._deep:
            holders += _inside(calls[k][1:3])
        return {*map(getrefcount, holders)} <= {_ALONE}


def _wrappers(calls: list[Any]) -> list[Any]:
    return list(chain.from_iterable(map(_made, calls)))


def _pattern(calls: list[Any], wrappers: list[Any]) -> list[int | None]:
    """Which of the wrappers the calls were given, in order, and how many different ones there are."""
    places = dict(zip(map(id, wrappers), range(len(wrappers)), strict=True))
    return [len(places), *map(places.get, map(id, chain.from_iterable(map(_flat, calls))))]


def _inside(tree: Any) -> Iterator[Any]:
    """The tuples, lists and dicts in it that have a tensor of ours in them."""
    for x in tree.values() if isinstance(tree, dict) else tree:
        if isinstance(x, (tuple, list, dict)) and _has_ours(x):
            yield x
            yield from _inside(x)


def _has_ours(tree: Any) -> bool:
    return any(
        type(x) is LazyTensor or (isinstance(x, (tuple, list, dict)) and _has_ours(x))
        for x in (tree.values() if isinstance(tree, dict) else tree)
    )
