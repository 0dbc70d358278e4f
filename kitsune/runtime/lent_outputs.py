"""The memory of a captured graph's outputs, and who still holds something of it."""

import weakref
from collections.abc import Callable, Sequence
from sys import getrefcount
from typing import Any

import torch
from torch._C import DispatchKey, DispatchKeySet

from kitsune.ir import Graph, lent_memory, mark_lent, storage_of, streams
from kitsune.ir.page import FEW_BYTES, N_COPIES
from kitsune.runtime.raw_copy import is_solid, raw_copy

# A tensor with a version counter of its own over the same memory; it does not go through the dispatcher.
_alias = torch._C.TensorBase.data.__get__  # type: ignore[attr-defined]
_data_ptr = torch._C.TensorBase.data_ptr
_count = torch._C._storage_Use_Count  # type: ignore[attr-defined]
_use_count = torch._C.TensorBase._use_count  # type: ignore[attr-defined]
_NO_COUNT = DispatchKeySet(DispatchKey.ADInplaceOrView)
SERIAL = "_kitsune_serial"
# A result of few bytes, such as a loss, is handed out as a copy once it was held at as many replays as this: moving what is
# held takes 60 us of Python, a copy 3 (`python -m benchmarks.bench_static`).
TIMES_HELD = 2
# Copies in a row that nobody held any more at the next replay, after which the memory itself is lent again.
IN_VAIN = 16
# Memory for so many copies is taken at once: by itself, in the middle of a step, each takes 7 us, and in a row 1.
AHEAD = 16


class OutputMemory:
    """One storage of outputs. `lent` has, by value number, the tensors that are handed out at each replay, those on this storage
    among others; `release` moves those of this storage that are still held."""

    # Is it to be moved no more? A graph of the program's may have its address, and this one is not replayed again.
    stays = False

    def __init__(self, outputs: dict[int, torch.Tensor], lent: dict[int, torch.Tensor], moved: Callable[[int], None]) -> None:
        # Never given to anybody, so that they count the storage's use and keep its geometry.
        self._outputs = {number: _alias(tensor) for number, tensor in outputs.items()}
        self._storage: Any = storage_of(next(iter(self._outputs.values())))
        self._moved, self._lent = moved, lent
        # Made by others on this memory, and known; by id, since a step may bring hundreds of gradients.
        self._adopted: dict[int, weakref.ref[torch.Tensor]] = {}
        self.key: int = self._storage._cdata
        self.attributes: dict[str, Any] = vars(self._storage)
        self._lend()
        # How many tensors are on the storage that nobody holds: counted when it is first lent; until then the capture has some.
        self.own_count = -1
        self.may_copy = _may_copy([*self._outputs.values()])
        # Does the graph itself write the copy? Then `copy_at` is where the next replay is to, 0 if it is not.
        self.in_graph, self.copy_at = False, 0
        self._raw_copy, self._address = raw_copy(self._storage.device), _data_ptr(next(iter(self._outputs.values())))
        self._n_held = self._n_in_vain = 0
        # The copies that were handed out last, and those that will be next.
        self._copies: list[weakref.ref[torch.Tensor]] = []
        self._next: list[tuple[int, torch.Tensor]] = []
        # Memory for copies after that, and the stream that it was taken on, whose it is.
        self._spares: list[torch.Tensor] = []
        self._spares_of, self._stream = 0, streams.handle_of(self._storage.device)
        mark_lent(self._storage, self)

    @property
    def copies(self) -> bool:
        """Is a copy handed out? Of a small result that is held again and again; a loss and the same detached are one result."""
        return self.may_copy and self._n_held >= TIMES_HELD

    def prepare(self) -> None:
        """Take memory for the next copy, since there may be none: after the replay it would be too late to say so."""
        first, *others = self._outputs
        stream = self._stream()
        if not self._spares or self._spares_of != stream:
            self._spares = [torch.empty_like(self._outputs[first]) for _ in range(AHEAD)]
            self._spares_of = stream
        copy = self._spares.pop()
        self.copy_at = _data_ptr(copy)
        self._next = [(first, copy), *[(number, _alias(copy)) for number in others]]

    def copy(self, values: list[Any]) -> None:
        """Put a copy of the outputs into `values`; it is nobody's to move."""
        copies, self._next = self._next, []
        first, copy = copies[0]
        if not (self.in_graph or self._raw_copy(_data_ptr(copy), self._address, self._storage.nbytes())):
            copy.copy_(self._outputs[first])
        self._copies = []
        for number, copy in copies:
            values[number] = copy
            self._copies.append(weakref.ref(copy))
        self._moved(1)

    def still_copies(self) -> bool:
        """Was the last copy of use? Asked before the next replay; once it was not for long, `copies` is False again."""
        self.copy_at = 0
        self._n_in_vain = 0 if any(copy() is not None for copy in self._copies) else self._n_in_vain + 1
        if self._n_in_vain >= IN_VAIN:
            self._n_held = self._n_in_vain = 0
            self._spares = []
        return self.copies

    def _lend(self) -> None:
        lent = {number: _alias(tensor) for number, tensor in self._outputs.items()}
        self._lent.update(lent)
        self._lent_ids = set(map(id, lent.values()))

    def adopt(self, tensor: torch.Tensor) -> None:
        """A tensor on this memory that somebody else made is to be moved with the others."""
        # Once: known tensors are counted, and one more than there are would hide a holder who is not known.
        if id(tensor) not in self._lent_ids:
            known = self._adopted.get(id(tensor))
            if known is None or known() is not tensor:
                self._adopted[id(tensor)] = weakref.ref(tensor)

    def release(self) -> bool:
        """Move what is held to memory of its own. False if somebody holds what is not known here, and all stays as it is.

        Raises torch.OutOfMemoryError, and nothing has moved.
        """
        if self.stays:
            return False
        adopted = [tensor for ref in self._adopted.values() if (tensor := ref()) is not None]
        if 0 <= self.own_count < _count(self.key) - len(adopted):
            return False
        alive = adopted + held([self._lent[number] for number in self._outputs])
        if alive:
            self._n_held += 1
            self._move(alive)
            self._lend()
        else:
            # What is written next is another storage to the program.
            self.attributes.pop(SERIAL, None)
        self._adopted.clear()
        return True

    def _move(self, alive: list[torch.Tensor]) -> None:
        with (
            torch._C._DisableTorchDispatch(),  # type: ignore[attr-defined]
            torch._C._ExcludeDispatchKeyGuard(_NO_COUNT),
            torch.inference_mode(False),
            torch.no_grad(),
            streams.in_order(self._storage.device),
        ):
            # All of it, copied at once.
            nothing = torch.empty(0, dtype=torch.uint8, device=self._storage.device)
            memory = _on(nothing, self._storage, 0, (self._storage.nbytes(),), (1,)).clone()
            streams.used_by_all(memory)
            storage: Any = storage_of(memory)
            del nothing, memory
            for tensor in alive:
                conj, neg = tensor.is_conj(), tensor.is_neg()
                # Marked tensors would be computed first.
                torch._C._set_conj(tensor, False)
                torch._C._set_neg(tensor, False)
                _on(tensor, storage, torch._C.TensorBase.storage_offset(tensor), tensor.shape, tensor.stride())
                torch._C._set_conj(tensor, conj)
                torch._C._set_neg(tensor, neg)
        if SERIAL in self.attributes:
            # To the program it is the same storage as before.
            setattr(storage, SERIAL, self.attributes.pop(SERIAL))
        self._moved(len(alive))


def _on(tensor: torch.Tensor, storage: Any, offset: Any, shape: Any, stride: Any) -> torch.Tensor:
    return torch.ops.aten.set_.source_Storage_storage_offset(tensor, storage, offset, shape, stride)


def _may_copy(tensors: list[torch.Tensor]) -> bool:
    """Is this, all on one storage, a small result?"""
    return bool(storage_of(tensors[0]).nbytes() <= FEW_BYTES) and _are_one(tensors)


def small_results(outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """One tensor for each small result among the outputs, in their order."""
    groups = [[*together.values()] for together in _by_storage(dict(enumerate(outputs)))]
    return [tensors[0] for tensors in groups if _may_copy(tensors)]


def _by_storage(outputs: dict[int, torch.Tensor]) -> list[dict[int, torch.Tensor]]:
    found: dict[int, dict[int, torch.Tensor]] = {}
    for number, tensor in outputs.items():
        found.setdefault(storage_of(tensor)._cdata, {})[number] = tensor
    return [*found.values()]


def _are_one(tensors: list[torch.Tensor]) -> bool:
    """Do these tensors of one storage show all of it, in the same way?"""
    shown = {(t.dtype, t.shape, t.stride(), torch._C.TensorBase.storage_offset(t)) for t in tensors}
    whole = is_solid(tensors[0]) and tensors[0].numel() * tensors[0].itemsize == storage_of(tensors[0]).nbytes()
    return whole and len(shown) == 1 and not any(t.is_conj() or t.is_neg() for t in tensors)


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


def _holds(tensors: list[Any]) -> list[tuple[int, int]]:
    """How many places in Python refer to each tensor, and how many in C++."""
    return list(zip(map(getrefcount, tensors), map(_use_count, tensors), strict=True))


_somewhere = {0: torch.empty(0)}
# Of a tensor that is in a dict and in the list that is asked about, and nowhere else.
_NOBODY = _holds([*_somewhere.values()])[0]
# The places in Python of one that is only in a dict.
_ALONE = next(map(getrefcount, _somewhere.values()))


def held(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Those of the tensors, each in a dict and in this list, that anybody else holds."""
    return [t for t, holds in zip(tensors, _holds(tensors), strict=True) if holds != _NOBODY]


class Lent:
    """The memory of all outputs of a captured graph, which copies the first `n_copies` of its small results itself."""

    def __init__(self, outputs: dict[int, torch.Tensor], moved: Callable[[int], None], n_copies: int = 0) -> None:
        self._tensors: dict[int, torch.Tensor] = {}
        groups = _by_storage(outputs)
        self.memories = [OutputMemory(together, self._tensors, moved) for together in groups]
        self._in_graph = [memory for memory in self.memories if memory.may_copy][:n_copies]
        for memory in self._in_graph:
            memory.in_graph = True
        self._nowhere = (0,) * (N_COPIES - len(self._in_graph))
        # What a program may have written on their storages.
        self._attributes = [memory.attributes for memory in self.memories]
        # Which memory each tensor lies in.
        self._owners = [k for k, together in enumerate(groups) for _ in together]
        self._keys = [memory.key for memory in self.memories]
        self._counts: list[int] = []
        self._nobody = [_ALONE] * len(self._tensors), [_NOBODY[1]] * len(self._tensors)
        # Those of which copies are handed out.
        self._copying, self.stays = list[OutputMemory](), False

    def stay(self) -> None:
        """Move nothing from now on, and write nothing: there is to be no other replay."""
        self.stays = True
        for memory in self.memories:
            memory.stays = True

    def release(self) -> bool:
        """Move what is still held of the replay before. False if somebody holds what cannot be moved."""
        if self.stays or not self._counts:
            return not self.stays
        if self._copying:
            self._copying = [memory for memory in self._copying if memory.still_copies()]
            for memory in self._copying:
                memory.prepare()
        tensors, counts = self._tensors.values(), list(map(_count, self._keys))
        if (list(map(getrefcount, tensors)), list(map(_use_count, tensors))) == self._nobody and counts == self._counts:
            for attributes in self._attributes:
                attributes.pop(SERIAL, None)
            return True
        # Mostly one of hundreds: the loss of the step before.
        holds = _holds([*tensors])
        held = {self._owners[k] for k, known in enumerate(holds) if known != _NOBODY}
        held |= {k for k, (count, own) in enumerate(zip(counts, self._counts, strict=True)) if count != own}
        for k, memory in enumerate(self.memories):
            if k not in held:
                memory.attributes.pop(SERIAL, None)
            elif not memory.release():
                return False
            elif memory.copies and memory not in self._copying:
                memory.prepare()
                self._copying.append(memory)
        return True

    @property
    def copies_at(self) -> tuple[int, ...]:
        """Where the next replay is to put its copies."""
        return (*[memory.copy_at for memory in self._in_graph], *self._nowhere)

    def hand_out(self, values: list[Any]) -> None:
        """Put the outputs into `values`."""
        if not self._counts:
            self._counts = list(map(_count, self._keys))
            for memory, count in zip(self.memories, self._counts, strict=True):
                memory.own_count = count
        for number, tensor in self._tensors.items():
            values[number] = tensor
        for memory in self._copying:
            memory.copy(values)

    def addresses(self) -> dict[int, int]:
        """Where each output is when it is handed out."""
        return {number: _data_ptr(tensor) for number, tensor in self._tensors.items()}

    def forget(self) -> None:
        """Refer to none of the memory any more; what others hold of it is theirs."""
        self.memories.clear()
        self._copying.clear()
        self._tensors.clear()
