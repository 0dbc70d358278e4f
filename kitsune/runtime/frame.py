"""One run of a plan: the tensors and addresses that its instructions share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from kitsune.ir import Access, TensorType, storage_of

# Not the attributes of torch.Tensor, which are watched while a program is recorded.
data_ptr = torch._C.TensorBase.data_ptr
storage_offset = torch._C.TensorBase.storage_offset
_view, _as_strided = torch._C.TensorBase.view, torch._C.TensorBase.as_strided
_set = torch.ops.aten.set_.source_Storage_storage_offset
# Every byte of poisoned memory: NaN for floats, -1 for integers.
POISON = 255
# Plans for which a block keeps tensors: the regions of a step may share one.
MAX_NOTES = 16


class Startable(Protocol):
    """Kernels, ready to start.

    `start` puts them on a stream, all of them or none: after an exception, their ops are run in another way. `address` tells
    where the first element of an access is.
    """

    def start(self, address: Callable[[Access], int], scalars: list[float], stream: int) -> None: ...


class Block(Protocol):
    """Memory for an arena: bytes, the address of the first, and what is kept as long as the memory is."""

    tensor: torch.Tensor
    address: int
    notes: dict[Any, Any]


class Pool(Protocol):
    """Where arenas come from; see `kitsune.memory.MemoryPool`."""

    def take(self, nbytes: int, device: torch.device, stream: int) -> Any: ...

    def give(self, block: Any) -> None: ...

    def share(self, block: Any) -> None: ...

    def free_all(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a plan's memory is: `places` gives (slot, bytes) by value number, `arena` (bytes, type) by that of a root.

    Slot 0 is the arena; `inputs` are (slot, value number, whether from the start of the input's memory). Value numbers are below
    `n_values`: a planner may have added to those that were recorded.
    """

    places: dict[int, tuple[int, int]]
    arena: dict[int, tuple[int, TensorType]]
    inputs: tuple[tuple[int, int, bool], ...]
    n_slots: int
    n_values: int


# Torch's own: what is in its place while a context is open is a door of the program's.
_set_fills = torch._C._set_deterministic_fill_uninitialized_memory


def unfilled(type_: TensorType) -> torch.Tensor:
    """New memory for what is about to be computed. With deterministic algorithms torch fills what is new, which would cost a
    launch, on a stream that may not be the one that writes the result."""
    fills = torch._C._get_deterministic_algorithms() and torch._C._get_deterministic_fill_uninitialized_memory()
    if not fills:
        return torch.empty_strided(type_.shape, type_.stride, dtype=type_.dtype, device=type_.device)
    try:  # An interrupt may come as soon as it is off.
        _set_fills(False)
        return torch.empty_strided(type_.shape, type_.stride, dtype=type_.dtype, device=type_.device)
    finally:
        _set_fills(True)


def poison(tensor: torch.Tensor) -> None:
    """New memory may hold the right values from an earlier run: a kernel that writes nothing would pass."""
    storage = storage_of(tensor)
    _set(torch.empty(0, dtype=torch.uint8, device=tensor.device), storage, 0, (storage.nbytes(),), (1,)).fill_(POISON)


class Frame:
    """What a run has so far. `values` are tensors by value number, None where there is none or nobody needs one.

    `memory` has tensors over memory that kernels fill, by the number of the root value; they are put into `values` once they
    are filled. `bases` are addresses, by slot. `furnished` are the values in the arena that are in `values` from the start;
    `partial`: the instruction that runs may have written something already. `elsewhere` are root values that it
    has computed into other memory than theirs. New memory is `poisoned`, which shows what is not written.
    """

    __slots__ = (
        "_typed",
        "address",
        "bases",
        "block",
        "elsewhere",
        "furnished",
        "layout",
        "memory",
        "partial",
        "poisoned",
        "position",
        "scalars",
        "stream",
        "values",
    )

    def __init__(self, layout: Layout, values: list[Any], scalars: list[float], stream: int, poisoned: bool = False) -> None:
        self.layout, self.values, self.scalars, self.stream, self.poisoned = layout, values, scalars, stream, poisoned
        self.memory: dict[int, torch.Tensor] = {}
        self.furnished: dict[int, torch.Tensor] = {}
        self.block: Block | None = None
        # The arena by dtype.
        self._typed: dict[torch.dtype, torch.Tensor] = {}
        self.position = 0
        self.partial = False
        self.elsewhere: set[int] = set()
        values.extend([None] * (layout.n_values - len(values)))
        places, bases = layout.places, [0] * layout.n_slots
        self.bases = bases

        def address(access: Access) -> int:
            slot, nbytes = places[access.value.id]
            return bases[slot] + nbytes

        self.address = address
        self.find_inputs()

    def find_inputs(self) -> None:
        """Look where the inputs are: also behind what makes room, which moves the results of graphs that are still held."""
        values, bases = self.values, self.bases
        for slot, number, from_start in self.layout.inputs:
            tensor = values[number]
            bases[slot] = data_ptr(tensor) - (storage_offset(tensor) * tensor.itemsize if from_start else 0)

    def move_in(self, block: Block) -> None:
        """Use a block as the arena."""
        self.block = block
        self._typed.clear()
        self.bases[0] = block.address
        if self.poisoned:
            block.tensor.fill_(POISON)

    def furnish(self, key: Any, make: Callable[["Frame"], dict[int, torch.Tensor]]) -> None:
        """Put the tensors in the arena that a plan needs into `values`; a block keeps them for the plan's next run."""
        assert self.block is not None
        notes = self.block.notes
        known = notes.get(key)
        if known is None:
            if len(notes) >= MAX_NOTES:
                notes.clear()
            self.furnished = make(self)
            known = notes[key] = (self.furnished, dict(self.memory))
        else:
            self.furnished = known[0]
            self.memory.update(known[1])
        values = self.values
        for number, tensor in self.furnished.items():
            values[number] = tensor

    def memory_of(self, number: int) -> torch.Tensor:
        """A tensor over the memory of root value `number`."""
        tensor = self.memory.get(number)
        if tensor is None:
            nbytes, type_ = self.layout.arena[number]
            tensor = self.memory[number] = self.in_arena(nbytes, type_)
        return tensor

    def in_arena(self, nbytes: int, type_: TensorType) -> torch.Tensor:
        """A tensor of a type that begins `nbytes` into the arena."""
        base = self._typed.get(type_.dtype)
        if base is None:
            assert self.block is not None
            base = self._typed[type_.dtype] = _view(self.block.tensor, type_.dtype)
        # Below autograd it has a count of writes of its own. (To make a tensor and set it there takes six times as long: 4 ms of
        # BERT's first run.)
        tensor: torch.Tensor = _as_strided(base, type_.shape, type_.stride, storage_offset(base) + nbytes // type_.dtype.itemsize)
        if type_.conj or type_.neg:
            torch._C._set_conj(tensor, type_.conj)
            torch._C._set_neg(tensor, type_.neg)
        return tensor
