"""Memory that is lent: a captured graph writes its results into the same memory at every replay.

Whoever runs the graph marks such storages, and moves what is still held before it replays. What cannot be found again (a view
of the tensor, an address) must not lie there: `own` moves a tensor to memory of its own first.
"""

import weakref
from collections.abc import Iterable
from typing import Any, Protocol

import torch

from kitsune.ir.tensor_type import storage_of


class LentMemory(Protocol):
    """One storage that is written again and again."""

    def release(self) -> bool:
        """Move every known tensor on it to other memory; False where it has to stay, and must not be written for now."""
        ...

    def adopt(self, tensor: torch.Tensor) -> None:
        """From now on this tensor on the memory is known too."""
        ...


def mark_lent(storage: Any, memory: LentMemory) -> None:
    """Let `lent_memory` find what a storage belongs to, as long as that is alive."""
    storage._kitsune_lent = weakref.ref(memory)


def lent_memory(tensor: torch.Tensor) -> LentMemory | None:
    """The graph's memory that a strided tensor lies in, if it does."""
    mark = getattr(storage_of(tensor), "_kitsune_lent", None)
    return mark() if mark is not None else None


def own(tensor: torch.Tensor) -> None:
    """Let a strided tensor lie in memory that nobody else will write, it and all that share its memory."""
    memory = lent_memory(tensor)
    if memory is not None:
        memory.release()


def adopt_views(made: Iterable[torch.Tensor], known: Iterable[torch.Tensor]) -> None:
    """Let tensors that a region made move with the memory that they lie in; those in `known` do so already."""
    ids = set(map(id, known))
    for tensor in {id(t): t for t in made if id(t) not in ids}.values():
        memory = lent_memory(tensor)
        if memory is not None:
            memory.adopt(tensor)
