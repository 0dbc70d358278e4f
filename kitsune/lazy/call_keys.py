"""By what a call of torch's API is known at its place in a region."""

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
    append, plain, flat = key.append, region.plain, call.flat
    for a in args:
        cls = type(a)
        if cls is LazyTensor:
            cell = a.cell
            flat.append(a)
            if cell.region is region:
                append(cell.ref.graded if a.virtual is not None or (region.real and a.requires_grad) else cell.ref)
            else:
                append(_fresh(region, a, call))
        elif cls is Tensor or cls is Parameter:
            known = plain.get(id(a))
            flat.append(a)
            append(_fresh(region, a, call) if known is None else known.ref.graded if a.requires_grad else known.ref)
        elif cls in CONSTANTS:
            append(a)
        else:
            append(_part(region, a, call))
    for name, a in kwargs.items():
        append(name)
        append(_part(region, a, call))
    return tuple(key)


def _part(region: Any, a: Any, call: Incoming) -> Any:  # noqa: C901 - one case per type of argument
    cls = type(a)
    if cls in CONSTANTS:
        return a
    if cls is LazyTensor or cls is Tensor or cls is Parameter:
        call.flat.append(a)
        cell = a.cell if cls is LazyTensor else region.plain.get(id(a))
        if cell is None or cell.region is not region:
            return _fresh(region, a, call)
        if cls is LazyTensor and a.virtual is None and not region.real:
            return cell.ref
        return cell.ref.graded if a.requires_grad else cell.ref
    if cls is bool:
        return TRUE if a else FALSE
    if cls is float:
        call.floats.append(a)
        return FLOAT
    if cls is tuple or cls is list or cls is torch.Size:
        return (cls, *[_part(region, x, call) for x in a])
    if cls is slice:
        return (SLICE, *[_part(region, x, call) for x in (a.start, a.stop, a.step)])
    if a is Ellipsis:
        return a
    call.unknown = True
    if isinstance(a, Tensor):
        call.flat.append(a)
    elif isinstance(a, dict):
        for x in a.values():
            _part(region, x, call)
    elif isinstance(a, (list, tuple)):
        for x in a:
            _part(region, x, call)
    return None


def _fresh(region: Any, tensor: Any, call: Incoming) -> Any:
    """The key of a tensor that is new to the region: what it is like, and what memory it shares."""
    known = call.fresh.get(id(tensor))
    if known is not None:
        return (AGAIN, list(call.fresh).index(id(tensor)))
    real = tensor
    if type(tensor) is LazyTensor:
        real = tensor.cell.real
        if real is None or tensor.virtual is not None:
            call.unknown = True
            return None
    if region.oddness(real) is not None:
        call.unknown = True
        return None
    graded = tensor.requires_grad
    if graded and not tensor.is_leaf:
        call.unknown = True
        return None
    serial = serial_of(real)
    if serial in call.serials:
        # Which of the two begins the storage is the ops' affair.
        call.unknown = True
        return None
    call.serials.add(serial)
    call.fresh[id(tensor)] = (tensor, serial)
    storage = region.storages.get(serial)
    type_ = tensor.cell.type if type(tensor) is LazyTensor else type_of(tensor)
    return (type_.at_start() if storage is None else type_, storage, graded)
