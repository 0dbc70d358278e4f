"""Functions of torch's in whose place the program, or Kitsune, has put others."""

import os
import sys
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodDescriptorType, WrapperDescriptorType
from typing import Any

import torch

# Torch's functions in C++, and the doors that stand before them.
DOORS: dict[Any, Any] = {}
# Where torch's functions in Python find the names in which they ask a mode.
_OWNERS: tuple[Any, ...] = (torch.Tensor, torch.nn.functional, torch.functional, torch.nn.init, torch.autograd)
_TORCH = os.path.dirname(torch.__file__) + os.sep
# Doors, too, are in the place of torch's, and know what they do.
_OURS = str(Path(__file__).parents[1]) + os.sep
_IN_C = (BuiltinFunctionType, MethodDescriptorType, WrapperDescriptorType)


def is_torchs(function: Any) -> bool:
    """Is this no library's that has been put in its place? Its code, and that of what it wraps, is torch's."""
    code = getattr(function, "__code__", None)
    if code is None:
        return type(function) in _IN_C
    return code.co_filename.startswith(_TORCH) and is_torchs(getattr(function, "__wrapped__", torch.add))


def is_ours(function: Any) -> bool:
    """Is this one of Kitsune's?"""
    code = getattr(function, "__code__", None)
    return code is not None and code.co_filename.startswith(_OURS)


def is_untouched(function: Any) -> bool:
    """Is this torch's own, or a door before it?"""
    return is_torchs(function.__wrapped__ if is_ours(function) else function)


def _is_still(function: Any, original: Any) -> bool:
    """Is this the original, or a door before it? (Dynamo has doors, too.)"""
    while function is not original and (is_ours(function) or is_torchs(function)) and hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function is original


def _is_helper(value: Any) -> bool:
    """Of Python's, which torch's modules have among their own."""
    return (getattr(value, "__module__", None) or "").partition(".")[0] in sys.stdlib_module_names


def _is_function(value: Any) -> bool:
    return callable(value) and not isinstance(value, type) and not _is_helper(value)


# As they were when Kitsune was imported.
_ORIGINALS = [{name: value for name in dir(owner) if _is_function(value := getattr(owner, name))} for owner in _OWNERS]
_TORCHS = frozenset(id(value) for originals in _ORIGINALS for value in originals.values())
# Functions that had been replaced by then: with what, nobody can tell, so that calls of torch's API cannot be taken.
REPLACED_BEFORE = tuple(
    f"{owner.__name__}.{name}"
    for owner, originals in zip(_OWNERS, _ORIGINALS, strict=True)
    for name, value in originals.items()
    if not (is_torchs(value) or is_ours(value))
)


def original_of(func: Any) -> Any:
    """Torch's function, if the program has put `func` in its place, or None.

    torch asks a mode in the name of what it finds under its function's name. That is running already and has called the
    original: to call it once more would have it do everything twice.
    """
    if getattr(func, "__code__", None) is None or id(func) in _TORCHS or is_ours(func):
        return None
    for owner, originals in zip(_OWNERS, _ORIGINALS, strict=True):
        for name, value in vars(owner).items():
            if value is func:
                return originals.get(name)
    return None


class Named:
    """What a function of torch's in Python finds under names, and what those of torch's that it calls do. Where it is followed,
    none of that is called, and what the program has put there would not be."""

    def __init__(self, function: Any) -> None:
        found = dict.fromkeys(_named(function))
        self._owners = list(dict.fromkeys(owner for owner, _ in found))
        names = [[name for its, name in found if its is owner] for owner in self._owners]
        # At least two, or what is got is no tuple.
        self._getters = [attrgetter(*its, its[0]) for its in names]
        self._original = self._last = self._now()
        self._torchs = bool(found) and all(is_torchs(value) for values in self._original for value in values)

    def are_torchs(self) -> bool:
        """Is it all torch's own?"""
        now = self._now()
        if now != self._last:
            pairs = [pair for a, b in zip(now, self._original, strict=True) for pair in zip(a, b, strict=True)]
            if not all(_is_still(value, original) for value, original in pairs):
                return False
            self._last = now
        return self._torchs

    def _now(self) -> list[tuple[Any, ...]]:
        return [get(owner) for get, owner in zip(self._getters, self._owners, strict=True)]


def _named(function: Any) -> Iterator[tuple[Any, str]]:
    """(owner, name) of the functions that texts of torch's name."""
    waiting, seen = [function], set()
    while waiting:
        here = waiting.pop()
        if here in seen or not is_torchs(here):
            continue
        seen.add(here)
        if hasattr(here, "__wrapped__"):
            waiting.append(here.__wrapped__)
        module = sys.modules[here.__globals__["__name__"]]
        for name in _names_in(here.__code__):
            value = vars(module).get(name)
            if isinstance(value, FunctionType) and not _is_helper(value):
                waiting.append(value)
                yield module, name
            # Not by getattr: torch imports some of what it is asked for.
            yield from ((owner, name) for owner in (torch, torch.linalg) if _is_function(vars(owner).get(name)))
            if _is_function(getattr(torch.Tensor, name, None)):
                yield torch.Tensor, name


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)
