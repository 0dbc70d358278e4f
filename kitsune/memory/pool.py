"""Run-time memory for arenas: blocks that are used again while they fit, and given back to torch when they do not."""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch

ALIGNMENT = 512
# Above 16 MiB a block is a multiple of what torch's allocator deals in: an eighth of an arena would be too much to waste.
LARGE, LARGE_STEP = 16 << 20, 2 << 20
# Room is made for a block that is larger by this much than the last one that room was made for: not for every shape anew.
GROWTH = 1.25
Place = tuple[torch.device, int]


@dataclass(eq=False)
class Block:
    """Memory on loan: `tensor` has `nbytes` bytes (uint8), of which the first is at `address`, a multiple of 512.

    `notes` is for who borrows it: it is kept as long as the memory is, such as tensors that lie in it.
    """

    tensor: torch.Tensor
    nbytes: int
    address: int
    place: Place
    notes: dict[Hashable, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    """Bytes in all blocks, bytes in those on loan, and how often a block was there (`hits`) or had to be made (`misses`)."""

    held_bytes: int
    used_bytes: int
    hits: int
    misses: int


class MemoryPool:
    """Blocks by device and stream. Safe to use from several threads.

    Regions run one after the other, so that one block serves them all: the smallest that has room is used again, and those
    that are too small are let go of before a larger one is made. Of the blocks that nobody uses, the most recently used are
    kept, `budget` bytes of them at most. A block is used again on the stream that it was made for only, whose order of work
    keeps an earlier user's kernels before a later one's. `make_room(device)` is called before a large block is made, which fits
    into nothing that there was before.
    """

    def __init__(self, budget: int, make_room: Callable[[torch.device], None] = lambda device: None) -> None:
        if budget < 0:
            raise ValueError(f"A pool's budget is a number of bytes, 0 or more, not {budget}.")
        self.budget, self._make_room = budget, make_room
        # The bytes that room was made for, by place.
        self._room: dict[Place, int] = {}
        # Also entered by a finalizer that runs a region while this thread is inside.
        self._lock = threading.RLock()
        self._idle: OrderedDict[int, Block] = OrderedDict()
        self._used: dict[int, Block] = {}
        # A list, so that the finalizer may add to it while it is gone through.
        self._shared: list[weakref.ref[Block]] = []
        self._hits = self._misses = 0

    def take(self, nbytes: int, device: torch.device, stream: int) -> Block:
        """A block of at least `nbytes` bytes. Raises torch.OutOfMemoryError as torch.empty does."""
        size, place = size_class(nbytes), (device, stream)
        with self._lock:
            block = self._reuse(size, place)
            if block is not None:
                return block
            self._misses += 1
            for number in [number for number, idle in self._idle.items() if idle.place == place]:
                del self._idle[number]
            grows = size > LARGE and size > GROWTH * self._room.get(place, 0)
            if grows:
                self._room[place] = size
        if grows:
            self._make_room(device)
        block = _new_block(size, place)
        with self._lock:
            self._used[id(block)] = block
        return block

    def give(self, block: Block) -> None:
        """Return a block that was taken. Its memory may be handed out again at once."""
        with self._lock:
            if self._used.pop(id(block), None) is None:
                raise ValueError("This block is not on loan from this pool: give each block back once, to the pool it is from.")
            self._idle[id(block)] = block
            self.trim(self.budget)

    def share(self, block: Block) -> None:
        """Somebody keeps a block that was taken, and has its memory while nobody uses it. As long as it is kept it can be taken
        again, even when it was let go of here, which frees nothing: whoever comes next would get memory beside it."""
        with self._lock:
            self._shared = [*(other for other in self._shared if other() is not None), weakref.ref(block)]

    def trim(self, budget: int) -> None:
        """Let go of idle blocks, those used longest ago first, until at most `budget` bytes of them are left."""
        with self._lock:
            idle = sum(block.nbytes for block in self._idle.values())
            while idle > budget:
                _, block = self._idle.popitem(last=False)
                idle -= block.nbytes

    def free_all(self) -> None:
        """Let go of every idle block; those on loan are kept or let go of when they come back, as ever."""
        self.trim(0)

    def give_way(self) -> None:
        """Let go of every idle block, for others to use the memory: room is made again for those that come after."""
        with self._lock:
            self._room.clear()
        self.free_all()

    @property
    def statistics(self) -> PoolStatistics:
        """What is held now and what was asked for so far."""
        with self._lock:
            used = sum(block.nbytes for block in self._used.values())
            idle = sum(block.nbytes for block in self._idle.values())
            return PoolStatistics(used + idle, used, self._hits, self._misses)

    def _reuse(self, size: int, place: Place) -> Block | None:
        shared = [block for ref in self._shared if (block := ref()) is not None and id(block) not in self._used]
        fitting = [block for block in (*self._idle.values(), *shared) if block.place == place and block.nbytes >= size]
        if not fitting:
            return None
        block = min(fitting, key=lambda block: block.nbytes)
        self._used[id(block)] = block
        self._idle.pop(id(block), None)
        self._hits += 1
        return block


def size_class(nbytes: int) -> int:
    """The size of the block that `nbytes` get: eight sizes for each power of two, so that at most an eighth is wasted.

    Below 4 KiB blocks differ by 512 bytes, the alignment; above 16 MiB by 2 MiB.
    """
    if nbytes < 0:
        raise ValueError(f"A block has 0 or more bytes, not {nbytes}.")
    step = LARGE_STEP if nbytes > LARGE else max(ALIGNMENT, 1 << max(0, nbytes.bit_length() - 4))
    return max(step, -(-nbytes // step) * step)


def _new_block(nbytes: int, place: Place) -> Block:
    device, _ = place
    tensor = torch.empty(nbytes, dtype=torch.uint8, device=device)
    # Not the attribute of torch.Tensor, which is watched while a program is recorded.
    address = torch._C.TensorBase.data_ptr(tensor)
    if address % ALIGNMENT:
        tensor = torch.empty(nbytes + ALIGNMENT, dtype=torch.uint8, device=device)
        skip = -torch._C.TensorBase.data_ptr(tensor) % ALIGNMENT
        tensor = tensor[skip : skip + nbytes]
        address = torch._C.TensorBase.data_ptr(tensor)
    return Block(tensor, nbytes, address, place)
