"""By what a call of torch's API is known at its place in a region.

This and `CallLane._follow` are the hot path: a call that is followed has to cost less than eager's.
"""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from kitsune.ir import TensorType, type_of
from kitsune.lazy.cell import is_leaf, serial_of
from kitsune.lazy.edges import Incoming, bytes_before
from kitsune.lazy.recorder import CONSTANTS, FALSE, FLOAT, TRUE
from kitsune.lazy.recording import PLAIN
from kitsune.lazy.scalar_sources import kind_of
from kitsune.lazy.tensor import LazyTensor

AGAIN, BESIDE, SLICE = object(), object(), object()
# From this length on a list of tensors is known by the ids of its tensors: an optimizer passes the same state in every step.
LONG = 12


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


def with_floats(key: Any, floats: list[float], move: bool) -> Any:
    """The key of a call that has these floats, which may `move` from call to call without making it another one."""
    if not floats:
        return key
    return (key, tuple(map(kind_of if move else float.hex, floats)))


def _append_parts(region: Any, arguments: Any, call: Incoming, key: list[Any]) -> None:
    append, plain, flat, arrivals = key.append, region.plain, call.flat, region.recorder.arrivals
    for a in arguments:
        cls = type(a)
        if cls is LazyTensor:
            flat.append(a)
            cell = a.cell
            if cell.region is region:
                known = cell.ref if cell.spent is False and not region.real else None
                append(cell.ref.graded if cell.owed is not None else known or _with_history(region, a, call))
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
            if seen is not None and seen[1] not in region.storages and seen[1] not in call.fresh:
                call.fresh[seen[1]] = a
                append(seen[2])
            else:
                append(_fresh(region, a, call))
        elif cls in CONSTANTS:
            append(a)
        elif cls is tuple or cls is list or cls is torch.Size:
            if len(a) >= LONG:
                append(_long_part(region, a, call))
                continue
            part: list[Any] = [cls]
            _append_parts(region, a, call, part)
            append(tuple(part))
        else:
            append(_other_part(region, a, cls, call))


def _with_history(region: Any, a: LazyTensor, call: Incoming) -> Any:
    """The key of a tensor in the region of whose history autograd knows, if it has one."""
    if a.cell.spent is not False:
        call.unknown = True
    return a.cell.ref.graded if a.requires_grad else a.cell.ref


def _long_part(region: Any, items: Any, call: Incoming) -> Any:
    """The key of a long list. Where it is all fresh plain tensors, an object stands for it, one for each such list of types."""
    bundles, ids = region.recorder.known.lists, tuple(map(id, items))
    known = bundles.get(ids)
    if known is not None:
        serials, stand_in, _ = known
        if (
            region.plain.keys().isdisjoint(ids)
            and region.storages.keys().isdisjoint(serials)
            and call.fresh.keys().isdisjoint(serials)
        ):
            call.flat.extend(items)
            call.fresh.update(zip(serials, items, strict=True))
            return stand_in
    n_fresh = len(call.fresh)
    part: list[Any] = [type(items)]
    _append_parts(region, items, call, part)
    key = tuple(part)
    if call.unknown or len(call.fresh) != n_fresh + len(ids) or any(type(t) not in PLAIN for t in items):
        return key
    serials = tuple(call.fresh)[n_fresh:]
    stand_in = region.recorder.known.parts.setdefault(key, object())
    if all(p[1] is None for p in part[1:]):
        bundles[ids] = (serials, stand_in, _while_alive(items, bundles, ids))
    return stand_in


def _while_alive(tensors: Any, table: dict[Any, Any], number: Any) -> list[Any]:
    """Weak references that take an entry, known by the ids of the tensors, out of the table when one of them dies."""

    def dead(_: Any) -> None:
        table.pop(number, None)

    return [weakref.ref(t, dead) for t in tensors]


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
    if type(tensor) is not LazyTensor:
        seen = arrival(region, tensor)
        serial = -1 if seen is None else seen[1]
    else:
        real: Any = tensor.cell.real
        odd = real is None or tensor.cell.owed is not None or region.oddness(real) is not None
        seen, serial = None, -1 if odd else serial_of(real)
    other = call.fresh.get(serial)
    if other is tensor:
        return (AGAIN, list(call.fresh).index(serial))
    if seen is not None and other is not None and not tensor.requires_grad and type(other) is not LazyTensor:
        return _beside(tensor, other, serial, seen[2], call)
    if serial < 0 or other is not None or (type(tensor) is LazyTensor and tensor.requires_grad):
        # A graph from elsewhere is autograd's, and so is a leaf that was made in a context: backwards that are followed know of
        # plain leaves alone. Of leaves and results that share memory, how they lie there is not looked at.
        call.unknown = True
        return None
    call.fresh[serial] = tensor
    return _part(region, tensor.cell.type, real, serial, False) if seen is None else seen[2]


def _beside(tensor: Any, other: Any, serial: int, part: Any, call: Incoming) -> Any:
    """The key of a tensor in memory that `other` brings: how they lie to each other. Which one begins it is the ops' affair."""
    position = next((k for k, (_, known) in enumerate(call.beside) if known is tensor), None)
    if position is not None:
        return (AGAIN, BESIDE, position)
    call.beside.append((serial, tensor))
    return (BESIDE, list(call.fresh).index(serial), bytes_before(tensor) - bytes_before(other), part)


def arrival(region: Any, tensor: Any) -> tuple[Any, int, Any] | None:
    """By what a plain tensor is known that is new to the region, as `arrivals` have it; None if no key can tell it."""
    # Who asks may be torch's module, with the lane in between.
    with torch._C.DisableTorchFunction():
        graded = tensor.requires_grad
        if region.oddness(tensor) is not None or (graded and not is_leaf(tensor)):
            return None
        serial = serial_of(tensor)
        part = _part(region, type_of(tensor), tensor, serial, graded)
        if part[1] is not None:
            return None, serial, part
        # One object for equal parts: matchers compare by identity.
        recorder, number = region.recorder, id(tensor)
        part = recorder.known.parts.setdefault(part, part)
        known = recorder.arrivals[number] = (_while_alive([tensor], recorder.arrivals, number), serial, part)
        return known


def _part(region: Any, type_: TensorType, real: Any, serial: int, graded: bool) -> Any:
    """The part of a key of a tensor that is new to the region."""
    storage = region.storages.get(serial)
    where = None if storage is None else region.where(real, storage)
    # A view with a history begins where its base does. (One without is made each time: minibatches may begin anywhere.)
    return (type_ if graded else type_.at_start(), where, graded)
