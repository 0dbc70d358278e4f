"""The memory of a captured graph's outputs, and who still holds something of it."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch._C import DispatchKey, DispatchKeySet

from kitsune.ir import Graph, lent_memory, mark_lent, storage_of

# A tensor with a version counter of its own over the same memory; it does not go through the dispatcher.
_alias = torch._C.TensorBase.data.__get__  # type: ignore[attr-defined]
_count = torch._C._storage_Use_Count  # type: ignore[attr-defined]
_NO_COUNT = DispatchKeySet(DispatchKey.ADInplaceOrView)
SERIAL = "_kitsune_serial"


class OutputMemory:
    """One storage of outputs. `hand_out` makes tensors on it for their holders; `release` moves those that are still held."""

    def __init__(self, outputs: dict[int, torch.Tensor], moved: Callable[[int], None]) -> None:
        # By value number: never given to anybody, so that they count the storage's use and keep its geometry.
        self._outputs = {number: _alias(tensor) for number, tensor in outputs.items()}
        self._storage: Any = storage_of(next(iter(self._outputs.values())))
        self._moved = moved
        self._held: list[weakref.ref[torch.Tensor]] = []
        # Bound once: this is done for every output of every replay.
        self._key: int = self._storage._cdata
        self._attributes: dict[str, Any] = vars(self._storage)
        self._own_count: int | None = None
        mark_lent(self._storage, self)

    def hand_out(self, values: list[Any]) -> None:
        """Put a fresh tensor for each output into `values`."""
        if self._own_count is None:
            self._own_count = _count(self._key)
        for number, tensor in self._outputs.items():
            values[number] = made = _alias(tensor)
            self._held.append(weakref.ref(made))

    def adopt(self, tensor: torch.Tensor) -> None:
        """A tensor on this memory that somebody else made is to be moved with the others."""
        # Once: known tensors are counted, and one more than there are would hide a holder who is not known.
        if not any(ref() is tensor for ref in self._held):
            self._held.append(weakref.ref(tensor))

    def release(self) -> bool:
        """Move what is held to memory of its own. False if somebody holds what is not known here, and all stays as it is.

        Raises torch.OutOfMemoryError, and nothing has moved.
        """
        alive = [tensor for ref in self._held if (tensor := ref()) is not None]
        if self._own_count is not None and _count(self._key) > self._own_count + len(alive):
            return False
        if alive:
            self._move(alive)
        else:
            # What is written next is another storage to the program.
            self._attributes.pop(SERIAL, None)
        self._held.clear()
        return True

    def _move(self, alive: list[torch.Tensor]) -> None:
        with (
            torch._C._DisableTorchDispatch(),  # type: ignore[attr-defined]
            torch._C._ExcludeDispatchKeyGuard(_NO_COUNT),
            torch.inference_mode(False),
            torch.no_grad(),
        ):
            nbytes = self._storage.nbytes()
            fresh = torch.empty(nbytes, dtype=torch.uint8, device=self._storage.device)
            storage: Any = storage_of(fresh)
            fresh.copy_(_on(torch.empty(0, dtype=torch.uint8, device=fresh.device), self._storage, 0, (nbytes,), (1,)))
            for tensor in alive:
                conj, neg = tensor.is_conj(), tensor.is_neg()
                # Marked tensors would be computed first.
                torch._C._set_conj(tensor, False)
                torch._C._set_neg(tensor, False)
                _on(tensor, storage, torch._C.TensorBase.storage_offset(tensor), tensor.shape, tensor.stride())
                torch._C._set_conj(tensor, conj)
                torch._C._set_neg(tensor, neg)
        if SERIAL in self._attributes:
            # To the program it is the same storage as before.
            setattr(storage, SERIAL, self._attributes.pop(SERIAL))
        self._moved(len(alive))


def _on(tensor: torch.Tensor, storage: Any, offset: Any, shape: Any, stride: Any) -> torch.Tensor:
    return torch.ops.aten.set_.source_Storage_storage_offset(tensor, storage, offset, shape, stride)


def views_of_inputs(graph: Graph) -> tuple[int, ...]:
    """The numbers of the outputs that lie in an input's memory."""
    came = {value.storage for value in graph.inputs}
    return tuple(value.id for value in graph.outputs if value.storage in came)


def adopt_views(numbers: tuple[int, ...], values: list[Any]) -> None:
    """Some outputs were made as views of inputs, which may be results of a graph: it is to move these too before it replays."""
    for number in numbers:
        memory = lent_memory(values[number])
        if memory is not None:
            memory.adopt(values[number])


def output_memories(outputs: dict[int, torch.Tensor], moved: Callable[[int], None]) -> list[OutputMemory]:
    """The outputs of a captured graph, by storage."""
    by_storage: dict[int, dict[int, torch.Tensor]] = {}
    for number, tensor in outputs.items():
        by_storage.setdefault(storage_of(tensor)._cdata, {})[number] = tensor
    return [OutputMemory(together, moved) for together in by_storage.values()]
