"""`y[:, 0] = 0`: torch makes a tensor of the number on the CPU, and has a view of `y` filled with that. No call could bring that
tensor along the next time, and a region that reads one on the CPU is no CUDA graph; with the number itself both can be."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kitsune.lazy.tensor import LazyTensor

SET_ITEM: Any = Tensor.__setitem__
_GET_ITEM: Any = Tensor.__getitem__
_FILL: Any = Tensor.fill_
_NUMBERS = (int, type(None))
# Of these torch refuses a number beyond the largest one alone, and no sign, zero or infinity.
_FLOATS = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
_base_of: Any = torch._C.TensorBase._base.__get__  # type: ignore[union-attr]


def sets_a_number(tensor: Any, index: Any = None, value: Any = None) -> bool:
    """Is a part of a result, by numbers and slices, filled with a number that is one of its dtype?

    A view of a parameter, taken without gradients, would leave the backward of a region that writes it unknown.
    """
    if type(tensor) is not LazyTensor or type(value) not in (int, float, bool):
        return False
    # Torch says at once of a number that the dtype has no room for it, of what has several elements in one place, and of a leaf,
    # or a view that was taken without gradients, that they may not be written.
    if not _has_room(tensor.dtype, value) or 0 in tensor.stride():
        return False
    if torch.is_grad_enabled() and (tensor.is_leaf if tensor.requires_grad else _base_of(tensor) is not None):
        return False
    parts = index if type(index) is tuple else (index,)
    # Of all of it torch takes no view.
    return all(map(_is_plain, parts)) and any(map(_takes_part, parts))


def _has_room(dtype: torch.dtype, value: Any) -> bool:
    if dtype not in _FLOATS:
        return dtype is torch.bool and type(value) is bool
    if type(value) is int and not -(2**63) <= value < 2**63:
        return False
    return not math.isfinite(value) or abs(value) <= torch.finfo(dtype).max


def _is_plain(part: Any) -> bool:
    if type(part) is slice:
        return all(type(n) in _NUMBERS for n in (part.start, part.stop, part.step))
    return part is Ellipsis or type(part) in _NUMBERS


def _takes_part(part: Any) -> bool:
    return any(n is not None for n in (part.start, part.stop, part.step)) if type(part) is slice else part is not Ellipsis


def fill_part(call: Callable[..., Any], tensor: Any, index: Any, value: Any) -> None:
    """The same by two calls of torch's API."""
    part = call(_GET_ITEM, (), (tensor, index))
    call(_FILL, (), (part, value))
