"""By what a call of a static function is known: its arguments, and the modes of torch that it is made under."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._dynamo.guards import TensorGuards
from torch.nn import Parameter

from kitsune.ir import storage_of, type_of
from kitsune.lazy import LazyTensor, is_strided
from kitsune.static.moment import Unknowable, modes

asks_for_gradient: Any = torch._C.TensorBase.requires_grad.__get__  # type: ignore[attr-defined]
# Kinds of tensors that are remembered for each form of a call.
MOST = 16
_PLAIN = (torch.Tensor, Parameter)
_SPECIAL = "an argument is a tensor of another library, or sparse, nested, quantized or otherwise special"
_CONSTANTS = frozenset({int, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size})


@dataclass(slots=True)
class Asked:
    """A call: what it is known by, the tensors among its arguments and what has their memory, the storages of those, and the
    objects that are known by identity."""

    key: Any
    tensors: Sequence[Any]
    reals: Sequence[Any]
    storages: list[int]
    others: list[Any]


class Knower:
    """Tells the calls of one function from each other."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # By all of a call but its tensors: what is known of those of earlier calls. A check in C++ is cheaper than a key.
        self._seen: dict[Any, list[tuple[TensorGuards, Any]]] = {}

    def asked(self, args: Any, kwargs: Any) -> Asked:
        """A call with these arguments, made now. Raises Unknowable."""
        tensors: list[Any] = []
        others: list[Any] = []
        parts: list[Any] = [modes(self._device), *[_part(a, tensors, others) for a in args]]
        if kwargs:
            parts += [(name, _part(a, tensors, others)) for name, a in kwargs.items()]
        form = tuple(parts)
        if not tensors:
            return Asked((form, ()), [], [], [], others)
        with torch._C.DisableTorchFunction():
            lazy = any(type(t) is LazyTensor for t in tensors)
            reals = list(map(_computed, tensors))
            storages = [storage_of(t)._cdata for t in reals]
            types = self._types(form, tensors, lazy, _shared(reals, storages))
        return Asked((form, types), tensors, reals, storages, others)

    def check_of(self, call: Asked) -> Callable[..., bool] | None:
        """Tells tensors of a call's kind that do not share memory from others; None if it has other tensors, or none."""
        form, types = call.key
        return next((guard.check for guard, known in self._seen.get(form, ()) if known is types), None)

    def _types(self, form: Any, tensors: list[Any], lazy: bool, shared: Any) -> Any:
        seen = self._seen.setdefault(form, [])
        # A check takes a tensor with a graph for a leaf that asks for a gradient.
        simple = not lazy and shared is None and not any(map(asks_for_gradient, tensors))
        if simple:
            for guard, types in seen:
                if guard.check(*tensors):
                    return types
        types = tuple(map(_of_tensor, tensors)), shared
        if simple:
            sizes: Any = [list(t.shape) for t in tensors]
            strides: Any = [list(t.stride()) for t in tensors]
            seen.append((TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides), types))
            del seen[:-MOST]
        if len(self._seen) > MOST:
            self._seen.clear()
        return types


def _part(a: Any, tensors: list[Any], others: list[Any]) -> Any:
    cls = type(a)
    if isinstance(a, torch.Tensor):
        tensors.append(a)
        # One that is computed is what it holds.
        return torch.Tensor if cls is LazyTensor else cls
    if cls in _CONSTANTS:
        return cls, a
    if cls is float:
        return cls, a.hex()
    if cls is tuple or cls is list:
        return (cls, *[_part(x, tensors, others) for x in a])
    if cls is dict:
        return (cls, *[(name, _part(x, tensors, others)) for name, x in a.items()])
    others.append(a)
    return cls, id(a)


def _of_tensor(tensor: Any) -> tuple[Any, ...]:
    if type(tensor) is LazyTensor:
        real: Any = tensor.cell.real
        return tensor.cell.type.at_start(), False, real.is_inference()
    if not is_strided(tensor):
        raise Unknowable(_SPECIAL)
    if tensor.requires_grad and not tensor.is_leaf:
        raise Unknowable("an argument has an autograd graph from outside")
    return type_of(tensor).at_start(), tensor.requires_grad, tensor.is_inference()


def _computed(tensor: Any) -> Any:
    if type(tensor) is not LazyTensor:
        if type(tensor) not in _PLAIN or tensor.layout is not torch.strided:
            raise Unknowable(_SPECIAL)
        return tensor
    if tensor.cell.real is None or tensor.requires_grad:
        raise Unknowable("an argument is not computed yet, or has an autograd graph from outside")
    return tensor.cell.real


def _shared(reals: list[Any], storages: list[int]) -> Any:
    """Which arguments share memory, and where in it they lie; None if none does."""
    if len(set(storages)) == len(storages):
        return None
    return tuple((storages.index(s), t.storage_offset()) for s, t in zip(storages, reals, strict=True))
