"""By what a call of torch's API is known at its place in a region.

This and `CallLane._follow` are the hot path: a call that is followed has to cost less than eager's.
"""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from kitsune.ir import type_of
from kitsune.lazy.cell import serial_of
from kitsune.lazy.edges import Incoming
from kitsune.lazy.recorder import CONSTANTS, FALSE, FLOAT, TRUE
from kitsune.lazy.tensor import LazyTensor

AGAIN, SLICE = object(), object()


def key_of(region: Any, func: Any, args: Any, kwargs: Any, modes: Any, call: Incoming) -> tuple[Any, ...]:
    """The key of a call, and in `call` its tensors and its floats, which are no part of the key.

    Nothing of the region is changed. `call.unknown` is set where the call cannot be known by a key.
    """
    key: list[Any] = [func, modes]
    _append_parts(region, args, call, key)
    for name, a in kwargs.items():
        key.append(name)
        _append_parts(region, (a,), call, key)
    return tuple(key)


def _append_parts(region: Any, arguments: Any, call: Incoming, key: list[Any]) -> None:
    append, plain, flat, arrivals = key.append, region.plain, call.flat, region.recorder.arrivals
    for a in arguments:
        cls = type(a)
        if cls is LazyTensor:
            flat.append(a)
            cell = a.cell
            if cell.region is region:
                append(cell.ref.graded if cell.owed is not None or (region.real and a.requires_grad) else cell.ref)
            else:
                append(_fresh(region, a, call))
        elif cls is Tensor or cls is Parameter:
            flat.append(a)
            number = id(a)
            known = plain.get(number)
            if known is not None:
                append(known.ref.graded if a.requires_grad else known.ref)
                continue
            seen = arrivals.get(number)
            if seen is not None and seen[1] not in region.storages and seen[1] not in call.fresh and seen[0]() is a:
                call.fresh[seen[1]] = a
                append(seen[2])
            else:
                append(_fresh(region, a, call))
        elif cls in CONSTANTS:
            append(a)
        elif cls is tuple or cls is list or cls is torch.Size:
            part: list[Any] = [cls]
            _append_parts(region, a, call, part)
            append(tuple(part))
        else:
            append(_other_part(region, a, cls, call))


def _other_part(region: Any, a: Any, cls: Any, call: Incoming) -> Any:
    if cls is bool:
        return TRUE if a else FALSE
    if cls is float:
        call.floats.append(a)
        return FLOAT
    if cls is slice:
        part: list[Any] = [SLICE]
        _append_parts(region, (a.start, a.stop, a.step), call, part)
        return tuple(part)
    if a is Ellipsis:
        return a
    # The tensors in it are wanted all the same.
    call.unknown = True
    if isinstance(a, Tensor):
        call.flat.append(a)
    elif isinstance(a, dict):
        _append_parts(region, a.values(), call, [])
    elif isinstance(a, (list, tuple)):
        _append_parts(region, a, call, [])
    return None


def _fresh(region: Any, tensor: Any, call: Incoming) -> Any:
    """The key of a tensor that is new to the region: what it is like, and what memory it shares."""
    lazy = type(tensor) is LazyTensor
    real = tensor.cell.real if lazy else tensor
    if real is None or (lazy and tensor.cell.owed is not None) or region.oddness(real) is not None:
        call.unknown = True
        return None
    graded = tensor.requires_grad
    serial = serial_of(real)
    other = call.fresh.get(serial)
    if other is tensor:
        return (AGAIN, list(call.fresh).index(serial))
    if other is not None or (graded and not tensor.is_leaf):
        # Which of two tensors begins their storage is the ops' affair; a graph from elsewhere is autograd's.
        call.unknown = True
        return None
    call.fresh[serial] = tensor
    storage = region.storages.get(serial)
    type_ = tensor.cell.type if lazy else type_of(tensor)
    part = (type_.at_start() if storage is None else type_, storage, graded)
    if not lazy and storage is None:
        region.recorder.arrivals[id(tensor)] = (weakref.ref(tensor), serial, part)
    return part
