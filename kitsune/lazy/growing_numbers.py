"""Whole numbers that are others in each step: how many samples a mean is of, `sum / count`.

A whole number is part of what a call is known by, since it may be a size or a dimension. What a tensor is divided or multiplied
by may as well be the float of that value, which moves without making another region of each step.
"""

from typing import Any

import torch
from torch import Tensor

from kitsune.lazy.tensor import LazyTensor


def _found(names: str) -> frozenset[object]:
    owners = (Tensor, torch)
    return frozenset(getattr(owner, name) for owner in owners for name in names.split() if hasattr(owner, name))


# What they return is of the same dtype for either; the others' is for tensors of floats.
_DIVIDES = _found("__truediv__ div divide true_divide")
BY_NUMBER = _DIVIDES | _found("__mul__ __rmul__ mul multiply __itruediv__ div_ __imul__ mul_")
# Beyond it not every whole number is a float, and torch refuses some.
_MOST = 2**53


def as_float(node: Any, func: Any, args: Any, kwargs: Any) -> Any:
    """The arguments of such a call, with a float in place of a number that was another one when the call came here before."""
    if kwargs or len(args) != 2 or type(args[1]) is not int:
        return args
    tensor, number = args
    if type(tensor) is not LazyTensor and type(tensor) is not Tensor:
        return args
    if not (tensor.dtype.is_floating_point or (func in _DIVIDES and not tensor.dtype.is_complex)) or abs(number) >= _MOST:
        return args
    numbers = node.numbers = node.numbers or {}
    # None of one that moves.
    known = numbers.setdefault(func, number)
    if known == number:
        return args
    numbers[func] = None
    return (tensor, float(number))
