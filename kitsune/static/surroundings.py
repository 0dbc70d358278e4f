"""What a static function works on besides its arguments: modules and optimizers, and every tensor that these hold.

It is told whether all of it is still where it was: a parameter replaced, a state loaded, a flag changed, a hook added.
"""

import operator
import weakref
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as nn_module
from torch.optim import optimizer as optimizer_module

from kitsune.lazy import is_strided

_PLAIN = (bool, int, float, str, type(None))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS: list[dict[int, Any]] = [
    getattr(nn_module, f"_global_{name}")
    for name in ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
]
_GLOBAL_HOOKS += [optimizer_module._global_optimizer_pre_hooks, optimizer_module._global_optimizer_post_hooks]


def has_global_hooks() -> bool:
    """Are there hooks on all modules or all optimizers?"""
    return any(_GLOBAL_HOOKS)


def foreign_hooks() -> bool:
    """Are there any that are not Kitsune's own?"""
    return has_global_hooks() and any(
        not str(getattr(hook, "__module__", "")).startswith("kitsune.") for hooks in _GLOBAL_HOOKS for hook in hooks.values()
    )


class Surroundings:
    """The modules that were called, with all that they contain, and the optimizers that stepped.

    Modules and optimizers are held weakly, the tensors strongly: who drops this when a module or an optimizer dies
    (`gone` is called then) keeps nobody's memory.
    """

    def __init__(self, called: Iterable[nn.Module], optimizers: Iterable[Any], gone: Callable[[Any], Any]) -> None:
        called, optimizers = list(called), list(optimizers)
        modules = _with_children(called)
        self.roots = [weakref.ref(m, gone) for m in called]
        self.optimizers = [weakref.ref(optimizer, gone) for optimizer in optimizers]
        self._dicts: list[dict[str, Any]] = [d for m in modules for d in (m._parameters, m._buffers, m._modules)]
        self._hooks: list[Any] = [getattr(m, name) for m in modules for name in _HOOKS]
        for optimizer in optimizers:
            self._hooks += [optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks]
        self._flags = [vars(m) for m in modules]
        self.training = list(map(_training, self._flags))
        # Numbers and words that the modules keep, a dropout's probability for instance: names by dictionary, and their values.
        self._watch([(d, [n for n, value in d.items() if type(value) in _PLAIN and n != "training"]) for d in self._flags])
        self.held = self._held()
        self._tensors = [t for t in self.held if type(t) in (torch.Tensor, nn.Parameter) and is_strided(t)]
        # What was there at the last look: the containers, and what they held.
        self._containers: list[Iterable[Any]] = []
        self._empty: list[Any] = []
        self._optimizers: list[tuple[Any, Any, Any]] = []
        self._seen: list[Any] = []
        self.options: tuple[list[float], list[Any]] = ([], [])
        self._look()
        self.numbers, self.constants = self.options

    def outermost(self) -> list[Any]:
        """The modules that are part of no other, and the optimizers."""
        called = [module for reference in self.roots if (module := reference()) is not None]
        inner = {id(child) for module in called for child in _with_children([module])[1:]}
        outer = [module for module in called if id(module) not in inner]
        return [*outer, *(optimizer for reference in self.optimizers if (optimizer := reference()) is not None)]

    def tensors(self) -> list[torch.Tensor]:
        """The tensors that the modules and optimizers hold; special ones are known by identity only."""
        return self._tensors

    def in_place(self) -> bool:
        """Is every tensor, module and state that was there still there, and nothing else? Brings `options` up to date."""
        if self._is_as_seen():
            return True
        held = self._held()
        if len(held) != len(self.held) or not all(map(operator.is_, held, self.held)):
            return False
        self._look()
        return True

    def _look(self) -> None:
        """Remember what is there, option for option. `held` has been found to be in place."""
        optimizers = [(reference, optimizer) for reference in self.optimizers if (optimizer := reference()) is not None]
        groups = [group for _, optimizer in optimizers for group in optimizer.param_groups]
        states = [optimizer.state for _, optimizer in optimizers]
        states += [state for of_one in states for state in of_one.values() if type(state) is dict]
        # What is inside of a list may change while the list stays the same.
        lists = [value for group in groups for value in group.values() if type(value) is list]
        self._optimizers = [(reference, optimizer.state, optimizer.param_groups) for reference, optimizer in optimizers]
        self._empty = [d for d in self._dicts if not d]
        views = [dict.values(d) for d in (*(d for d in self._dicts if d), *states, *groups)]
        # And whose state it is, and what its pieces are called.
        self._containers = [*views, *states, *(of_one for *_, of_one in self._optimizers), *lists]
        self._seen = [*chain.from_iterable(self._containers), _END]
        self.options = _options_of(groups)

    def _is_as_seen(self) -> bool:
        """Is every object the very one that was there at the last look? Twice as fast as to ask what there is."""
        for reference, state, groups in self._optimizers:
            optimizer = reference()
            if optimizer is None or optimizer.state is not state or optimizer.param_groups is not groups:
                return False
        now = chain(chain.from_iterable(self._containers), _ENDS)
        return not any(self._empty) and all(map(operator.is_, now, self._seen))

    def unchanged(self) -> bool:
        """Are the flags and numbers of the modules what they were, and has nobody added a hook?"""
        if any(self._hooks) or list(map(_training, self._flags)) != self.training:
            return False
        try:
            return [read(d) for d, _, read in self._attributes] == self._values
        except KeyError:
            return False

    def hooked(self) -> bool:
        """Is there a hook on a module, or on an optimizer's step?"""
        return any(self._hooks)

    def hyperparameters(self) -> list[float]:
        """The floats of all `param_groups`, which may move."""
        optimizers = [optimizer for reference in self.optimizers if (optimizer := reference()) is not None]
        return _options_of([group for optimizer in optimizers for group in optimizer.param_groups])[0]

    def relax(self, other: "Surroundings") -> None:
        """Attributes that are others in a call that did the same do not matter: a module that counts its calls."""
        now = {id(d): dict(zip(names, _tupled(names, v), strict=True)) for (d, names, _), v in other._zipped()}
        kept = []
        for (d, names, _), values in self._zipped():
            new = now.get(id(d), {})
            kept.append((d, [n for n, v in zip(names, _tupled(names, values), strict=True) if n in new and new[n] == v]))
        self._watch(kept)

    def alive(self) -> bool:
        """Are all modules and optimizers still there?"""
        return all(reference() is not None for reference in (*self.roots, *self.optimizers))

    def difference(self, other: "Surroundings") -> str | None:
        """What has changed, in words."""
        if len(self.held) != len(other.held) or not all(map(operator.is_, self.held, other.held)):
            return "a module or an optimizer holds other tensors, or counts in Python numbers, after each call"
        if len(self.numbers) != len(other.numbers) or not alike(self.constants, other.constants):
            return "an optimizer has other options"
        return None if self.training == other.training else "modules were switched between training and evaluation"

    def _watch(self, attributes: list[tuple[dict[str, Any], list[str]]]) -> None:
        self._attributes = [(d, names, operator.itemgetter(*names)) for d, names in attributes if names]
        self._values = [read(d) for d, _, read in self._attributes]

    def _zipped(self) -> Iterable[tuple[Any, Any]]:
        return zip(self._attributes, self._values, strict=True)

    def _held(self) -> list[Any]:
        held: list[Any] = list(chain.from_iterable(map(dict.values, self._dicts)))
        for reference in self.optimizers:
            optimizer = reference()
            if optimizer is None:
                held.append(None)
                continue
            held += chain.from_iterable([group["params"] for group in optimizer.param_groups])
            states = optimizer.state.values()
            held += optimizer.state
            # A piece's name is part of where it is.
            held += chain.from_iterable(map(_entries, states)) if {*map(type, states)} <= {dict} else states
        return held


def _entries(state: dict[str, Any]) -> Iterable[Any]:
    return (*state, *state.values())


_training = operator.itemgetter("training")
# Comes after what the containers hold: one thing more or less is seen.
_END = object()
_ENDS = (_END,)


def _options_of(groups: list[dict[str, Any]]) -> tuple[list[float], list[Any]]:
    """The floats, and what else there is but parameters."""
    numbers: list[float] = []
    constants: list[Any] = []
    for group in groups:
        for name, value in group.items():
            if type(value) is float:
                numbers.append(value)
            elif type(value) is tuple or type(value) is list:
                if name != "params":
                    numbers += [v for v in value if type(v) is float]
                    constants += [v for v in value if type(v) is not float]
            else:
                constants.append(value)
    return numbers, constants


def _tupled(names: list[str], values: Any) -> Any:
    return values if len(names) > 1 else (values,)


def alike(a: Any, b: Any) -> bool:
    """Are these trees of constants the same? 1, 1.0 and True are not, NaN is like itself, and a tensor only like itself."""
    if a is b:
        return True
    if type(a) is not type(b) or isinstance(a, torch.Tensor):
        return False
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(alike, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(map(alike, a.values(), b.values()))
    if isinstance(a, float):
        return a.hex() == b.hex()
    return bool(a == b)


def _with_children(called: list[nn.Module]) -> list[nn.Module]:
    found: dict[int, nn.Module] = {}
    waiting = list(reversed(called))
    while waiting:
        module = waiting.pop()
        if id(module) not in found:
            found[id(module)] = module
            waiting += [child for child in module._modules.values() if child is not None]
    return list(found.values())
