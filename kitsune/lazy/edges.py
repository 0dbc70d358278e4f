"""Whole calls of torch's API that are known at a place of a region: what each takes in, what it leaves, how far it goes.

An op is known by its node in the trie; a call by an edge from the node before it to the node behind its last op.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from kitsune.ir import TensorType
from kitsune.lazy.cell import Cell, Ref, ref, serial_of
from kitsune.lazy.derived import Derived
from kitsune.lazy.tensor import LazyTensor
from kitsune.lazy.trie import Node

_storage_offset: Any = torch._C.TensorBase.storage_offset


class Incoming:
    """What a call brings along: its tensors in order, those that are new to the region, its moving numbers."""

    __slots__ = ("beside", "flat", "floats", "fresh", "unknown")

    def __init__(self) -> None:
        self.flat: list[Any] = []
        # By the serials of their storages.
        self.fresh: dict[int, Any] = {}
        # New as well, in memory that one of those brings: (serial, tensor). `edges[0]` and `edges[1]` as the places of an index.
        self.beside: list[tuple[int, Any]] = []
        self.floats: list[float] = []
        # It cannot be told from others by a key.
        self.unknown = False

    def new(self) -> list[tuple[int, Any]]:
        """All that are new to the region, with the serials of their storages."""
        return [*self.fresh.items(), *self.beside] if self.beside else list(self.fresh.items())


@dataclass(slots=True)
class Made:
    """A tensor that a call returns: its value, type and storage, what makes its wrapper, and the name of its history, if any.

    Or one that the call was given, among its tensors at position `turned`, and that has got a history by being written.
    """

    ref: Ref
    type: TensorType
    storage: int
    make: Any = field(compare=False)
    graded: str | None
    # As what the call made it, before it wrote to it.
    born: int = 0
    turned: int | None = None
    # Wrappers that were this in an earlier region, and that nobody holds any more; see `used_again.py`.
    spare: list[Any] = field(default_factory=list, init=False, compare=False, repr=False)


@dataclass(slots=True, eq=False)
class Edge:
    """A call at one place of a region: `func`, made under `modes`, leads from the node `start` to `node`.

    `arrivals` are (position among the fresh tensors, value, type, storage, does it collect a gradient); `rewrites` (position
    among all tensors, value afterwards); `dirty` are the storages that it writes; `bumps` the positions of the plain tensors that
    it writes, once for each write.
    `scalars` are its moving numbers as it has them; where `moves`, they are the call's own. `grads` are (leaf's value, what
    becomes of its gradient) after a backward.
    """

    start: Node
    func: Any
    modes: Any
    node: Node
    arrivals: tuple[tuple[int, Ref, TensorType, int, bool], ...]
    rewrites: tuple[tuple[int, Ref], ...]
    dirty: frozenset[int]
    bumps: tuple[int, ...]
    scalars: tuple[float, ...]
    moves: bool
    structure: Any
    form: int
    made: tuple[Made, ...]
    graded: bool
    grads: tuple[tuple[int, Made], ...] = ()
    # What it does was not recorded: it is made for real each time, which no gradient needs to know.
    plain: bool = False
    follows: bool = False
    forgotten: bool = False  # the call has done something else since
    free_matcher: bool | None = None  # has it a matcher, or will have one, and does that take any floats?
    # Is it a backward (`torch.Tensor.backward` changes with doors)? And which calls lead to its loss, once known.
    is_backward: bool = False
    spent: Any = None
    # Of the tensors that come in: (position among the fresh ones, number of the value).
    places: tuple[tuple[int, int], ...] = ()
    # Inputs of the region that it takes views of, and where each begins in its memory, since a view says where it is in that: by
    # the position among all tensors of a call, by the number of the value for a backward.
    begins: tuple[tuple[int, int], ...] = ()
    casts: tuple[Node, ...] = ()  # the operators by which autocast casts weights for it, and keeps what they make
    sources: Any = None  # of a backward or an update: where its numbers come from
    floats: list[float] = field(default_factory=list)
    derived: tuple[Derived, ...] = ()  # views of its own tensors that torch has made, and that come in as well

    def __post_init__(self) -> None:
        self.places = tuple((k, value.id) for k, value, *_ in self.arrivals)

    def same(self, other: "Edge") -> bool:
        """Did the call do again what it did before?"""
        return (
            self.node is other.node
            and self.arrivals == other.arrivals
            and self.derived == other.derived
            and self.rewrites == other.rewrites
            and self.bumps == other.bumps
            and self.structure == other.structure
            and self.plain == other.plain
            and self.moves == other.moves
            and self.grads == other.grads
            and self.made == other.made
            and self.begins == other.begins
        )


def history_of(tensor: Any) -> str:
    """The name of a tensor's place in the autograd graph, as torch prints it."""
    owed = tensor.cell.owed
    if owed is not None:
        name: str = owed.graded
        return name
    node = tensor.grad_fn
    return type(node).__name__ if type(node).__name__ != "CppFunction" else str(node.name().rpartition("::")[2])


class Before:
    """What is known of a call's tensors before it is made: their values and versions."""

    def __init__(self, flat: list[Any], region: Any) -> None:
        self._flat, self._region = flat, region
        self._cells = [cell_in(t, region) for t in flat]
        self._refs = [None if cell is None else cell.ref for cell in self._cells]
        self._versions = [0 if t.is_inference() else t._version for t in flat]
        self._graded = [t.requires_grad for t in flat]

    def read_beside(self, path: Sequence[Node], derived: Sequence[Derived]) -> list[tuple[Any, Ref | None]]:
        """The plain tensors, with values, that the call was given and none of its ops, nor a view of them. C++ may have read
        their numbers, which no key tells: the batch sizes of a packed sequence. (A wrapper has none to read.)"""
        taken, beside = {value.id for node in path if node.op is not None for value in node.op.inputs}, []
        viewed = {id(self._flat[one.position]) for one in derived}
        for tensor, known in zip(self._flat, self._refs, strict=True):
            cell = None if type(tensor) is LazyTensor else cell_in(tensor, self._region)
            value = None if cell is None else known or cell.came
            if type(tensor) is not LazyTensor and id(tensor) not in viewed and (value is None or value.id not in taken):
                beside.append((tensor, value))
        return beside

    def turned(self) -> list[int]:
        """The tensors that have got a history since, by being written; and so have all that share their memory."""
        first = {id(t): k for k, t in reversed(list(enumerate(self._flat)))}
        return sorted(k for k in first.values() if self._flat[k].requires_grad and not self._graded[k])

    def written(self) -> tuple[tuple[tuple[int, Ref], ...], tuple[int, ...]] | None:
        """The tensors that have been written since, as an Edge has them; None if one of them is of another kind now."""
        rewrites, bumps, seen = [], [], set()
        for k, (tensor, known, value) in enumerate(zip(self._flat, self._cells, self._refs, strict=True)):
            cell = cell_in(tensor, self._region)
            if cell is not known and known is not None:
                return None
            if cell is None or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            if cell.ref is not (value or cell.came):
                rewrites.append((k, cell.ref))
            # Also of a tensor that was written through a view of it.
            if not tensor.is_inference():
                bumps += [k] * (tensor._version - self._versions[k])
        return tuple(rewrites), tuple(bumps)


def path_between(before: Node, after: Node) -> list[Node] | None:
    """The nodes behind `before` up to `after`; None if the one does not lead to the other."""
    nodes: list[Node] = []
    node: Node | None = after
    while node is not None and node is not before:
        if node.depth <= before.depth:
            return None
        nodes.append(node)
        node = node.parent
    nodes.reverse()
    return nodes if node is before else None


def arrivals_of(path: Sequence[Node], fresh: Sequence[Any], region: Any) -> tuple[tuple[Any, ...], set[int]]:
    """Where the tensors come from that the nodes let in; and the numbers of those that are not among the call's own."""
    came = {}
    for k, tensor in enumerate(fresh):
        cell = cell_in(tensor, region)
        if cell is not None and cell.came is not None:
            came[cell.came.id] = k
    entered = [value for node in path for value in node.entered]
    known = [(came[value.id], value) for value in entered if value.id in came]
    found = [(k, ref(value.id), value.type, value.storage, fresh[k].requires_grad) for k, value in known]
    return tuple(found), {value.id for value in entered if value.id not in came}


def viewed_operands(path: Sequence[Node], flat: Sequence[Any], region: Any) -> tuple[tuple[int, int], ...]:
    """`begins` of a call's edge. Where a leaf begins is part of its key."""
    viewed, found = _viewed(path), []
    for k, tensor in enumerate(flat if viewed else ()):
        cell = cell_in(tensor, region)
        if cell is not None and cell.came is not None and cell.storage in viewed and not tensor.requires_grad:
            found.append((k, begin_of(tensor)))
    return tuple(found)


def viewed_inputs(path: Sequence[Node], region: Any, first: int) -> tuple[tuple[int, int], ...] | None:
    """`begins` of a backward's edge; None where one is a wrapper, or was not there before value `first`."""
    viewed = _viewed(path)
    cells = [cell for cell in region.plain.values() if cell.storage in viewed and not cell.real.requires_grad]
    wrapped = any(region.storages.get(serial_of(tensor)) in viewed for _, tensor in region.inputs)
    if wrapped or any(cell.came.id >= first for cell in cells):
        return None
    return tuple((cell.came.id, begin_of(cell.real)) for cell in cells)


def _viewed(path: Sequence[Node]) -> set[int]:
    return {storage for node in path if node.row is not None and node.row.is_view for *_, storage in node.results}


def begin_of(tensor: Any) -> int:
    """Where a tensor begins in its memory."""
    real = tensor.cell.real if type(tensor) is LazyTensor else tensor
    # Who asks may be torch's module, with the lane in between.
    with torch._C.DisableTorchFunction():
        return int(_storage_offset(real))


def bytes_before(tensor: torch.Tensor) -> int:
    """How much of its memory is before a tensor."""
    with torch._C.DisableTorchFunction():
        return int(_storage_offset(tensor)) * tensor.itemsize


def born(path: Sequence[Node], value: Ref) -> int:
    """The number of the value that a tensor was when one of the nodes made it."""
    before = {after.id: number for node in path for _, number, after, _ in node.written}
    number = value.id
    while number in before:
        number = before[number]
    return number


def cell_in(tensor: Any, region: Any) -> Cell | None:
    """The cell of a tensor in a region, if it is there."""
    if type(tensor) is LazyTensor:
        cell: Cell = tensor.cell
        return cell if cell.region is region else None
    return region.plain.get(id(tensor))  # type: ignore[no-any-return]
