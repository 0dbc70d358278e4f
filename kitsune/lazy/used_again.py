"""Wrappers that nobody holds any more stand for the same value of a later region. To make a wrapper and its cell, and to free
them, costs 2 us; to look whether an old one may be taken, 0.4.
"""

import weakref
from sys import getrefcount
from typing import Any

import torch

from kitsune.lazy.rebuild import tensors_in
from kitsune.lazy.tensor import LazyTensor

_use_count, _version = torch._C.TensorBase._use_count, torch._C.TensorBase._version.__get__  # type: ignore[attr-defined]


def counts_of(wrappers: list[Any]) -> tuple[list[int], list[int], list[int]]:
    """How many places in Python and in C++ refer to each, and how many do so weakly."""
    return list(map(getrefcount, wrappers)), list(map(_use_count, wrappers)), list(map(weakref.getweakrefcount, wrappers))


# Of a tensor that is in the list that is asked about, and nowhere else.
((_IN_PYTHON,), (_IN_C,), _) = counts_of([torch.empty(0)])


def give_back(wrappers: list[Any]) -> list[Any]:
    """Those that are in this list alone are taken out of their region, for a later one; returns the rest.

    One that somebody knows weakly, or has given an attribute, must die as it would in eager.
    """
    rest, written = [], []
    # A hundred in a step: each look counts.
    for wrapper, n, n_in_c, n_weak, version in zip(wrappers, *counts_of(wrappers), list(map(_version, wrappers)), strict=True):
        cell = wrapper.cell
        made = cell.home
        if made is None or n != _IN_PYTHON or n_in_c != _IN_C or n_weak or wrapper.__dict__:
            rest.append(wrapper)
            continue
        if version:
            written.append(wrapper)
        cell.region = cell.real = None
        cell.ref, cell.storage, cell.spent = made.ref, made.storage, False
        if cell.external:
            cell.external, cell.came = False, None
        made.spare.append(wrapper)
    if written:
        # Nobody shares their counts: who makes a view or an alias of a wrapper keeps it.
        torch._C._autograd._unsafe_set_version_counter(tuple(written), (0,) * len(written))  # type: ignore[attr-defined]
    return rest


class Unused:
    """Wrappers that nobody holds, until there is time to give them back."""

    def __init__(self) -> None:
        self._wrappers: list[Any] = []

    def add(self, wrappers: list[Any]) -> None:
        """There are more."""
        self._wrappers += wrappers

    def give_back(self) -> None:
        """There is time: what they stood for has been started."""
        wrappers, self._wrappers = self._wrappers, []
        give_back(wrappers)


def are_held(wrappers: list[Any], besides: int = 0) -> list[bool]:
    """Does anybody besides this list, and so many others that are known, hold each?"""
    holds = zip(wrappers, *counts_of(wrappers), strict=True)
    return [n != _IN_PYTHON + besides or n_in_c != _IN_C or n_weak > 0 or bool(t.__dict__) for t, n, n_in_c, n_weak in holds]


def drop_gradients(parameters: list[Any]) -> None:
    """What `zero_grad` does."""
    wrappers = []
    for parameter in parameters:
        grad = parameter.grad
        if grad is not None:
            parameter.grad = None
            if type(grad) is LazyTensor:
                wrappers.append(grad)
    grad = None
    give_back(wrappers)


def keep(tree: Any) -> None:
    """The wrappers in it stand for nothing else from now on: torch is given them, and may share their counts of writes."""
    for tensor in tensors_in(tree):
        if type(tensor) is LazyTensor:
            tensor.cell.home = None
