"""What a wrapper stands for, and the numbers by which storages and values are known."""

import itertools
from collections.abc import Iterable, Sequence
from sys import getrefcount
from typing import Any

import torch

from kitsune.ir import TensorType, storage_of

_serials = itertools.count()


def serial_of(tensor: torch.Tensor) -> int:
    """A number that the tensor's storage keeps for life. Addresses are reused within a step: wrong for 25 of 182 outputs."""
    storage: Any = storage_of(tensor)
    # Every result of a first step is new: no exception for that.
    serial: int | None = getattr(storage, "_kitsune_serial", None)
    if serial is None:
        storage._kitsune_serial = serial = next(_serials)
    return serial


def is_leaf(tensor: torch.Tensor) -> bool:
    """Has this tensor no history? Of a view among several of a base that was written since, autograd refuses to tell."""
    try:
        return tensor.is_leaf
    except RuntimeError:
        return False


def may_defer(tensor: torch.Tensor) -> bool:
    """May a read of this memory wait? Not if others write it unseen: NumPy, another process, who imported it by DLPack."""
    storage: Any = storage_of(tensor)
    # torch marks what it shares with NumPy as not resizable; the DLPack door marks what it lets out.
    return storage.resizable() and not hasattr(storage, "_kitsune_shared")


def share(tensor: torch.Tensor) -> None:
    """From now on others may write the memory of this tensor."""
    storage: Any = storage_of(tensor)
    storage._kitsune_shared = True


class Ref:
    """Stands for value number `id` of a region in keys; one object per number, so that keys compare by identity."""

    __slots__ = ("graded", "id")

    def __init__(self, id: int) -> None:
        self.id = id
        # Stands in keys of calls for the same value with a place in the autograd graph.
        self.graded = ("graded", id)

    def __repr__(self) -> str:
        return f"Ref({self.id})"


_refs: list[Ref] = []


def ref(id: int) -> Ref:
    """The Ref of a number."""
    try:
        return _refs[id]
    except IndexError:
        while id >= len(_refs):
            _refs.append(Ref(len(_refs)))
        return _refs[id]


class Aside:
    """A tensor's history is of former regions, or was used up before it was made; see `asides.py`. It does not lead to leaves."""

    __slots__ = ()

    def __bool__(self) -> bool:
        return False


# It may still be gone backward through; or that says that it was used up.
FORMER, GONE = Aside(), Aside()


class Cell:
    """What a wrapper stands for: a value of a region, and its tensor once it has been computed."""

    __slots__ = ("__weakref__", "came", "external", "home", "owed", "real", "ref", "region", "spent", "storage", "type")

    def __init__(
        self, region: Any, ref: Ref, type: TensorType, storage: int, real: torch.Tensor | None = None, came: Ref | None = None
    ) -> None:
        self.region = region
        self.ref = ref
        self.storage = storage
        self.type = type
        self.real = real
        # Came into the region from outside, as value `came`; not a result of one of its ops.
        self.external = came is not None
        self.came = came
        # Set while autograd does not know that the tensor has a history; and, once that is used up, the leaves that it led to.
        self.owed: Any = None
        # (Or an Aside, if autograd knows of a history that no call has to do with which is owed.)
        self.spent: Any = False
        # What its wrapper was made for, if it may be made to stand for the same once more; see `used_again.py`.
        self.home: Any = None


class Moved(list[Any]):
    """`spent` of a cell that has come into a later region: what it was in its own."""

    def __init__(self, cell: Cell) -> None:
        super().__init__(cell.spent)
        self.region, self.ref, self.storage = cell.region, cell.ref, cell.storage


def living(cells: list[Cell], left: Sequence[Any] = ()) -> list[Cell]:
    """The cells that something besides the list holds: a wrapper. (A weak reference to each would cost 0.3 us per op.) Those
    whose wrapper waits for another region are nobody's, and so are those of the wrappers in `left`."""
    # What a cell's count is when only the list holds it depends on the interpreter: ask one that is surely alone.
    cells.append(Cell(None, ref(0), _NO_TYPE, -1))
    counts = [getrefcount(cell) for cell in cells]
    cells.pop()
    alone = counts.pop()
    nobodys = {id(wrapper.cell) for wrapper in left}
    pairs = zip(cells, counts, strict=True)
    return [cell for cell, count in pairs if count > alone and cell.region is not None and id(cell) not in nobodys]


def left_in(region: Any, wrappers: Iterable[Any]) -> list[bool]:
    """Was each left by all but owed calls when the region was cut, so that nothing was computed for it?"""
    n = 0 if region.cut is None else region.cut.n_values
    return [(cell := t.cell).real is None and cell.region is region and cell.ref.id < n for t in wrappers]


def walks(region: Any) -> bool:
    """Are calls of a region being made again? Whoever asks for a value then is a finalizer."""
    return getattr(region.recorder.walk, "region", None) is region


def numbers_of(cells: Iterable[Cell]) -> tuple[int, ...]:
    """What the cells stand for now, in order."""
    return tuple(sorted({cell.ref.id for cell in cells}))


_NO_TYPE: Any = None
