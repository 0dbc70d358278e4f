"""The region in progress: a position in the trie, the tensors that came in, the values still pending."""

import weakref
from collections.abc import Callable
from typing import Any

import torch

from kitsune.ir import Barrier, TensorType, storage_of, type_of
from kitsune.lazy.cell import Cell, Ref, ref, serial_of
from kitsune.lazy.tensor import LazyTensor
from kitsune.lazy.trie import Node


class Region:
    """What was recorded since the last barrier."""

    __slots__ = (
        "admitted",
        "device",
        "dirty",
        "inputs",
        "n_storages",
        "n_values",
        "node",
        "observed_from",
        "odd",
        "plain",
        "produced",
        "scalars",
        "storages",
    )

    def __init__(self, root: Node, device: torch.device) -> None:
        self.node = root
        self.device = device
        self.n_values = 0
        self.n_storages = 0
        # id(tensor) -> cell. The cell holds the tensor, so the id stays its own while the region is open.
        self.plain: dict[int, Cell] = {}
        self.storages: dict[int, int] = {}
        self.inputs: list[tuple[int, torch.Tensor]] = []
        self.produced: list[weakref.ref[Cell]] = []
        self.scalars: list[float] = []
        # Storages that the region writes: reading one of them from outside must wait for the region.
        self.dirty: set[int] = set()
        # Depth from which ops were run at once; None while everything is pending.
        self.observed_from: int | None = None
        # (value, type, storage, undo) of the operands that the op at hand brought in, and why it cannot be recorded.
        self.admitted: list[tuple[int, TensorType, int, Callable[[], None]]] = []
        self.odd: Barrier | None = None

    def cell(self, tensor: Any) -> Cell:
        """The cell of a tensor that has come in."""
        return tensor.cell if type(tensor) is LazyTensor else self.plain[id(tensor)]

    def adopt(self, cell: Cell, recorder: Any) -> Any:
        """A wrapper of an earlier region comes in; returns its key."""
        if cell.real is None:
            cell.recorder.materialize(cell, Barrier.OUTSIDE)
        assert cell.real is not None
        before = (cell.region, cell.ref, cell.storage, cell.external, cell.recorder)

        def undo() -> None:
            cell.region, cell.ref, cell.storage, cell.external, cell.recorder = before

        key, cell.ref, cell.storage = self._number(cell.real, cell.type, undo)
        cell.region, cell.external, cell.recorder = self, True, recorder
        return key

    def admit(self, tensor: torch.Tensor, recorder: Any) -> Any:
        """A plain tensor comes in; returns its key, or sets `odd`."""
        odd = self._oddness(tensor)
        if odd is not None:
            self.odd = odd
            return None
        cell = Cell(recorder, self, None, 0, type_of(tensor))
        cell.real, cell.external = tensor, True
        key, cell.ref, cell.storage = self._number(tensor, cell.type, lambda: self.plain.pop(id(tensor)))
        self.plain[id(tensor)] = cell
        if tensor.requires_grad and tensor.is_leaf:
            recorder.leaves[id(tensor)] = weakref.ref(tensor)
        return key

    def rollback(self, n_scalars: int) -> None:
        """Undo what the key of an op that is not recorded has let in."""
        for _, _, storage, undo in reversed(self.admitted):
            undo()
            if storage >= self.node.n_storages:
                self.storages = {serial: s for serial, s in self.storages.items() if s != storage}
        if self.admitted:
            first = self.admitted[0][0]
            self.inputs = [(number, tensor) for number, tensor in self.inputs if number < first]
        self.admitted.clear()
        self.n_values, self.n_storages = self.node.n_values, self.node.n_storages
        del self.scalars[n_scalars:]
        self.odd = None

    def is_target(self, device: torch.device) -> bool:
        """Is this the device that is recorded for?"""
        return device == self.device or (device.type == self.device.type and device.index is None)

    def _number(self, tensor: torch.Tensor, type_: TensorType, undo: Any) -> tuple[Any, Ref, int]:
        serial = serial_of(tensor)
        storage = self.storages.get(serial)
        # Which inputs share memory is part of the key.
        key: Any = type_ if storage is None else (type_, storage)
        if storage is None:
            storage = self.storages[serial] = self.n_storages
            self.n_storages += 1
        number = ref(self.n_values)
        self.n_values += 1
        self.inputs.append((number.id, tensor))
        self.admitted.append((number.id, type_, storage, undo))
        return key, number, storage

    def _oddness(self, tensor: torch.Tensor) -> Barrier | None:
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested or tensor._is_zerotensor():
            return Barrier.FOREIGN_LAYOUT
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return Barrier.FOREIGN_TENSOR
        # A scalar on the CPU may take part in an op on another device.
        if not self.is_target(tensor.device) and (tensor.dim() or tensor.device.type != "cpu"):
            return Barrier.OTHER_DEVICE
        # NumPy may write what it shares, at any moment and unseen: torch marks such storages as not resizable.
        if self.device.type == "cpu" and not storage_of(tensor).resizable():
            return Barrier.FOREIGN_MEMORY
        return None
