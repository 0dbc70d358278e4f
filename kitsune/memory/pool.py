"""Run-time memory for arenas: blocks that are used again while they fit, and given back to torch when they do not."""

import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch

ALIGNMENT = 512
Key = tuple[int, torch.device, int]


@dataclass(eq=False, slots=True)
class Block:
    """Memory on loan: `tensor` has `nbytes` bytes (uint8), of which the first is at `address`, a multiple of 512.

    `notes` is for who borrows it: it is kept as long as the memory is, such as tensors that lie in it.
    """

    tensor: torch.Tensor
    nbytes: int
    address: int
    key: Key
    notes: dict[Hashable, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    """Bytes in all blocks, bytes in those on loan, and how often a block was there (`hits`) or had to be made (`misses`)."""

    held_bytes: int
    used_bytes: int
    hits: int
    misses: int


class MemoryPool:
    """Blocks by size class, device and stream. Safe to use from several threads.

    Of the blocks that nobody uses, the most recently used are kept, `budget` bytes of them at most. A block is used again on
    the stream that it was made for only, whose order of work keeps an earlier user's kernels before a later one's.
    """

    def __init__(self, budget: int) -> None:
        if budget < 0:
            raise ValueError(f"A pool's budget is a number of bytes, 0 or more, not {budget}.")
        self.budget = budget
        # Also entered by a finalizer that runs a region while this thread is inside.
        self._lock = threading.RLock()
        self._idle: OrderedDict[int, Block] = OrderedDict()
        self._used: dict[int, Block] = {}
        self._hits = self._misses = 0

    def take(self, nbytes: int, device: torch.device, stream: int) -> Block:
        """A block of at least `nbytes` bytes. Raises torch.OutOfMemoryError as torch.empty does."""
        key = (size_class(nbytes), device, stream)
        with self._lock:
            block = self._reuse(key)
            if block is not None:
                return block
            self._misses += 1
        block = _new_block(key)
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

    @property
    def statistics(self) -> PoolStatistics:
        """What is held now and what was asked for so far."""
        with self._lock:
            used = sum(block.nbytes for block in self._used.values())
            idle = sum(block.nbytes for block in self._idle.values())
            return PoolStatistics(used + idle, used, self._hits, self._misses)

    def _reuse(self, key: Key) -> Block | None:
        for number in reversed(self._idle):
            if self._idle[number].key == key:
                block = self._used[number] = self._idle.pop(number)
                self._hits += 1
                return block
        return None


def size_class(nbytes: int) -> int:
    """The size of the block that `nbytes` get: eight sizes for each power of two, so that at most an eighth is wasted.

    Below 4 KiB blocks differ by 512 bytes, the alignment.
    """
    if nbytes < 0:
        raise ValueError(f"A block has 0 or more bytes, not {nbytes}.")
    step = max(ALIGNMENT, 1 << max(0, nbytes.bit_length() - 4))
    return max(step, -(-nbytes // step) * step)


def _new_block(key: Key) -> Block:
    nbytes, device, _ = key
    tensor = torch.empty(nbytes, dtype=torch.uint8, device=device)
    # Not the attribute of torch.Tensor, which is watched while a program is recorded.
    address = torch._C.TensorBase.data_ptr(tensor)
    if address % ALIGNMENT:
        tensor = torch.empty(nbytes + ALIGNMENT, dtype=torch.uint8, device=device)
        skip = -torch._C.TensorBase.data_ptr(tensor) % ALIGNMENT
        tensor = tensor[skip : skip + nbytes]
        address = torch._C.TensorBase.data_ptr(tensor)
    return Block(tensor, nbytes, address, key)
