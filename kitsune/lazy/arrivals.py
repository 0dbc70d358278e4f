"""What is known of the plain tensors that come into regions step after step, as long as nobody can have changed them."""

import weakref
from collections.abc import Iterable
from operator import attrgetter
from typing import Any

import torch

from kitsune.ir import storage_of

_shape, _requires_grad = torch._C.TensorBase.shape.__get__, torch._C.TensorBase.requires_grad.__get__  # type: ignore[attr-defined]
_stride, _data_ptr = torch._C.TensorBase.stride, torch._C.TensorBase.data_ptr
_serial, _may_be_resized = attrgetter("_kitsune_serial"), torch.UntypedStorage.resizable


class Arrivals:
    """The tensors by id, lists of them, and what optimizers made of their groups.

    They are referred to weakly, and an entry goes with its tensor. It holds until somebody can have given the tensor another
    memory or shape: doors tell while a context is open, and where one is opened again, a look at the tensor.
    """

    def __init__(self) -> None:
        # By id: what watches the tensor and how it looked, the serial of its storage, what stands for it in keys.
        self.tensors: dict[int, tuple[list[Any], int, Any]] = {}
        # Of long lists, as optimizers pass: (serials, what stands for the list, references) by the tensors' ids.
        self.lists: dict[tuple[int, ...], Any] = {}
        self.groups: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
        # One object for each part of a key: matchers compare by identity.
        self.parts: dict[Any, Any] = {}
        # Tensors of a program's lists and numbers, where it reads or sets parts by them; see `items.py`.
        self.constants: dict[Any, Any] = {}
        # Counts the times that what is known of a tensor was dropped while the tensor lived.
        self.n_dropped = 0

    def forget(self) -> None:
        """A tensor may have another memory or shape than when it last came in."""
        self.n_dropped += 1
        for watch, *_ in self.tensors.values():
            # What has learned of a tensor by its entry keeps that, and torch swaps no tensor that somebody refers to weakly.
            watch.clear()
        self.tensors.clear()
        self.lists.clear()
        self.groups.clear()

    def clear(self) -> None:
        """No region is known any more."""
        self.forget()
        self.parts.clear()
        self.constants.clear()

    def drop(self, tensor: Any) -> None:
        """This tensor may be another than when it last came in."""
        known = self.tensors.pop(id(tensor), None)
        if known is not None:
            known[0].clear()
            self.n_dropped += 1
            self.lists.clear()

    def leave(self) -> None:
        """From now on no door is watched."""
        new = [watch for watch, _, _ in self.tensors.values() if len(watch) == 1]
        for watch, look in zip(new, _looks(watch[0]() for watch in new), strict=True):
            watch.append(look)

    def come_back(self) -> None:
        """Doors are watched again: forget what has changed in between. This costs 1 us a tensor."""
        known = list(self.tensors.items())
        looks = _looks([watch[0]() for _, (watch, _, _) in known])
        if looks == [watch[-1] for _, (watch, _, _) in known]:
            return
        for (number, (watch, _, _)), look in zip(known, looks, strict=True):
            if look is None or watch[1:] != [look]:
                # Last of all, since an interrupt may come at any line.
                self.n_dropped += 1
                self.lists.clear()
                self.tensors.pop(number, None)


def _looks(tensors: Iterable[Any]) -> list[Any]:
    """How each tensor looks: address, shape, strides, whether it needs a gradient, and its storage."""
    there = list(tensors)
    try:
        with torch._C.DisableTorchFunction():
            storages: list[Any] = list(map(storage_of, there))
            parts = [map(part, there) for part in (_data_ptr, _shape, _stride, _requires_grad)]
            return list(zip(*parts, map(_serial, storages), map(_may_be_resized, storages), strict=True))
    except (AttributeError, TypeError):
        # One has gone, or its storage is another: nothing is known of any.
        return [None] * len(there)


class Leaves(dict[int, "weakref.ref[torch.Tensor]"]):
    """Leaves that came in, or got a gradient, by id."""

    def note(self, tensor: torch.Tensor) -> None:
        """One did."""
        number = id(tensor)
        if number not in self:
            # Another tensor may get the id of one that is gone.
            self[number] = weakref.ref(tensor, lambda _: self.pop(number, None))

    def living(self) -> list[torch.Tensor]:
        """Those that are still alive."""
        return [leaf for known in list(self.values()) if (leaf := known()) is not None]
