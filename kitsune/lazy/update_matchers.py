"""A matcher of an optimizer's update, whose lists are those that were put together again for it: what is known of them as lists
need not be looked up tensor by tensor. To build and look up its key took 31 us with 6 parameters, and 119 with 62.
"""

from collections.abc import Callable
from itertools import chain, repeat
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch

from kitsune.lazy.edges import Edge, Incoming
from kitsune.lazy.host_counts import HostCounts, host_counts
from kitsune.lazy.scalar_sources import kind_of
from kitsune.lazy.tensor import LazyTensor

_cell, _ref, _region, _owed = map(attrgetter, ("cell", "ref", "region", "owed"))
_requires_grad = torch._C.TensorBase.requires_grad.__get__  # type: ignore[attr-defined]
# What compares as it means, once the types are the same.
_CONSTANTS = {bool, int, str, type(None)}


class UpdateMatcher:
    """Takes the calls of an optimizer's function that lead along an edge, and whose arguments are the `filled` lists in a given
    order. `call` is one that did, before it was followed."""

    def __init__(
        self, lane: Any, edge: Edge, kwargs: Any, call: Incoming, filled: Any, order: list[int], counts: HostCounts | None
    ) -> None:
        region, known, flat, lists = lane.recorder.region, lane.recorder.known, call.flat, filled[0].name
        self._pattern, self._order = None if counts is None else counts.pattern, order
        self.edge, self._modes, self._lists, self._n_dropped = edge, lane.modes[False], lists, known.n_dropped
        self._names, self._types, self._constants = list(kwargs), list(map(type, kwargs.values())), _constants(kwargs)
        self._options, self._floats = list(kwargs.values()), call.floats
        # Wrappers are told by their values, and plain tensors in the region by what it knows of them. Of others, what was
        # known when they came in is known still.
        self._wrappers = _picker([k for k, t in enumerate(flat) if type(t) is LazyTensor])
        self._refs = [t.cell.ref for t in flat if type(t) is LazyTensor]
        plain = [k for k, t in enumerate(flat) if type(t) is not LazyTensor]
        here = [k for k in plain if id(flat[k]) in region.plain]
        self._here, self._ids = _picker(here), [id(flat[k]) for k in here]
        self._here_refs = [region.plain[number].ref for number in self._ids]
        self._here_graded = [flat[k].requires_grad for k in here]
        self._new = _picker([k for k in plain if id(flat[k]) not in region.plain])
        self._serials = tuple(call.fresh)
        self._memories = frozenset(self._serials)

    @staticmethod
    def order(args: Any, kwargs: Any, call: Incoming, filled: Any) -> list[int] | None:
        """Which of the lists that were filled each argument is; None if such calls cannot be told by lists: if a tensor comes
        twice, or is an option."""
        lists = {*map(type, args)} == {list} and sum(map(len, args)) == len(call.flat) == len({*map(id, call.flat)})
        if filled is None or not lists or not {*map(type, kwargs.values())} <= _CONSTANTS | {float}:
            return None
        # RMSprop's function takes two of them the other way round.
        places = {tuple(map(id, content)): k for k, content in enumerate(filled[1])}
        found = [places.get(tuple(map(id, a))) for a in args]
        return None if None in found else found  # type: ignore[return-value]

    def match(self, lane: Any, args: Any, kwargs: Any, filled: Any) -> tuple[list[Any], Any, Any, Any, Any] | None:
        """The tensors of a call that leads along the edge, the serials of new ones, these, its numbers, and what is done on the
        host; None of any other. Nothing of the region is changed."""
        recorder = lane.recorder
        region = recorder.region
        if filled is None or filled[0].name is not self._lists or recorder.known.n_dropped != self._n_dropped:
            return None
        if region.slow or region.real or lane.modes[False] is not self._modes:
            return None
        if not _are(args, [filled[1][k] for k in self._order]):
            return None
        if not region.storages.keys().isdisjoint(self._memories) or not self._same_options(kwargs):
            return None
        flat = list(chain.from_iterable(args))
        cells = list(map(_cell, self._wrappers(flat)))
        if (
            list(map(_ref, cells)) != self._refs
            or any(map(_owed, cells))
            or not all(map(is_, map(_region, cells), repeat(region)))
        ):
            return None
        known = list(map(region.plain.get, self._ids))
        if None in known or list(map(_ref, known)) != self._here_refs:
            return None
        if list(map(_requires_grad, self._here(flat))) != self._here_graded:
            return None
        before, counts = self._floats, host_counts(self.edge.func, args, kwargs)
        if counts is not None:
            before = [*before, *counts.numbers]
        if (None if counts is None else counts.pattern) != self._pattern:
            return None
        numbers = self.edge.sources.numbers(before)
        return None if numbers is None else (flat, self._serials, self._new(flat), numbers, counts)

    def _same_options(self, kwargs: Any) -> bool:
        options = list(kwargs.values())
        if list(kwargs) != self._names:
            return False
        if all(map(is_, options, self._options)):
            return True
        if list(map(type, options)) != self._types or _constants(kwargs) != self._constants:
            return False
        floats = [v for v in options if type(v) is float]
        if list(map(kind_of, floats)) != list(map(kind_of, self._floats)):
            return False
        self._options, self._floats = options, floats
        return True


def _are(lists: Any, contents: Any) -> bool:
    """Is in the lists what was put there?"""
    return list(map(len, lists)) == list(map(len, contents)) and all(
        map(is_, chain.from_iterable(lists), chain.from_iterable(contents))
    )


def _constants(kwargs: Any) -> list[Any]:
    return [v for v in kwargs.values() if type(v) is not float]


def _picker(places: list[int]) -> Callable[[list[Any]], Any]:
    if len(places) > 1:
        return itemgetter(*places)
    return lambda flat: [flat[k] for k in places]
