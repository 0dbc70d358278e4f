"""The lists that an optimizer makes of a group's parameters, gradients and state: put together again from what was there before.

Torch's loop takes 1.1 us a parameter; comparing ids and picking by position 0.5.
"""

import weakref
from functools import partial
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any

from kitsune.lazy.new_state import collect
from kitsune.lazy.recording import PLAIN
from kitsune.lazy.tensor import LazyTensor

_GRADS, _grad_of = object(), attrgetter("grad")


class GroupLists:
    """What `_init_group` of an optimizer made of one of its groups, as long as every tensor of it lives."""

    def __init__(self, optimizer: Any, group: Any, lists: tuple[list[Any], ...], returned: Any) -> None:
        kept = [*group["params"], *_state(optimizer)]
        places = {id(t): k for k, t in enumerate(kept)}
        grads = _grads(group)
        self._names, self._options = list(group), _options(group)
        self._flags, self._returned, self._places = _flags(group), returned, _places(optimizer)
        # By what others know these lists, who are not to keep the watch on their tensors.
        self.name = object()
        self._ids = ids = list(map(id, kept))
        self._picks: list[Any] = [_pick(made, grads, places) for made in lists]
        flags = returned if type(returned) is tuple else (returned,)
        good = all(type(t) in PLAIN for t in kept) and None not in self._picks and {*map(type, flags)} <= {bool, type(None)}
        if not good or any(type(grad) is not LazyTensor for grad in grads):
            ids.clear()
            return
        # An id is good for as long as its tensor lives. Not a method of this: a cycle would keep the references for a while, and
        # torch swaps no tensor that somebody refers to weakly.
        self._watch = [weakref.ref(t, lambda _: ids.clear()) for t in kept]

    def fill(self, optimizer: Any, group: Any, lists: tuple[list[Any], ...]) -> list[Any] | None:
        """Put the same into empty lists again, and return what that is; None where something is not as it was."""
        if not self._ids or len(lists) != len(self._picks) or any(lists):
            return None
        kept = [*group["params"], *_state(optimizer)]
        if list(map(id, kept)) != self._ids or _places(optimizer) != self._places or not self._same_options(group):
            return None
        grads = _grads(group)
        # A plain gradient may be a sparse one.
        if set(map(type, grads)) != {LazyTensor}:
            return None
        contents = [grads if pick is _GRADS else pick(kept) for pick in self._picks]
        for made, content in zip(lists, contents, strict=True):
            made += content
        return contents

    def _same_options(self, group: Any) -> bool:
        # Objects that are the same need no further look: none of those that count can be changed in place.
        options = _options(group)
        if list(group) == self._names and all(map(is_, options, self._options)):
            return True
        if _flags(group) != self._flags:
            return False
        self._names, self._options = list(group), options
        return True

    @property
    def returned(self) -> Any:
        """What `_init_group` returned."""
        return self._returned


def _state(optimizer: Any) -> list[Any]:
    """Whose state there is, and all of it."""
    return [*optimizer.state, *chain.from_iterable(map(dict.values, optimizer.state.values()))]


def _places(optimizer: Any) -> list[tuple[str, ...]]:
    """What each parameter's pieces of state are called, in their order."""
    return list(map(tuple, optimizer.state.values()))


def _grads(group: Any) -> list[Any]:
    return list(map(_grad_of, group["params"]))


def _flags(group: Any) -> list[Any]:
    """What of a group decides how it is updated. Of its numbers only whether they are zero: SGD and RMSprop have buffers where
    their momentum is not."""
    return [(k, type(v), _flag(v)) for k, v in group.items() if k != "params"]


def _flag(option: Any) -> Any:
    if type(option) in (int, float):
        return option == 0, option > 0
    return option if type(option) in (bool, str) else None


def _options(group: Any) -> list[Any]:
    return [v for k, v in group.items() if k != "params"]


def _pick(made: list[Any], grads: list[Any], places: dict[int, int]) -> Any:
    """How a list is made again: the gradients, or a function that picks it out of parameters and state."""
    if made and len(made) == len(grads) and all(a is b for a, b in zip(made, grads, strict=True)):
        return _GRADS
    found = [places.get(id(t)) for t in made]
    if None in found:
        return None
    if len(found) > 1:
        return itemgetter(*found)
    return lambda kept: [kept[k] for k in found]


def make_lists(recorder: Any, original: Any, optimizer: Any, group: Any, lists: tuple[list[Any], ...]) -> Any:
    """What an optimizer's `_init_group`, the `original`, would put into the lists and return."""
    makes = partial(collect, recorder, lambda: original(optimizer, group, *lists), original.__module__.startswith("torch.optim."))
    if len(group["params"]) < 2 or any(type(made) is not list or made for made in lists):
        return makes()
    groups = recorder.known.groups.setdefault(optimizer, {})
    memo = groups.get(id(group))
    contents = None if memo is None else memo.fill(optimizer, group, lists)
    if contents is not None:
        recorder.filled = memo, contents
        return memo.returned
    returned = makes()
    groups[id(group)] = GroupLists(optimizer, group, lists, returned)
    return returned
