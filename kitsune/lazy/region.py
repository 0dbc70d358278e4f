"""The region in progress: a position in the trie, the tensors that came in, the values still pending."""

import weakref
from collections.abc import Callable, Iterable
from operator import itemgetter
from typing import Any

import torch

from kitsune.ir import Barrier, Handover, TensorType, type_of
from kitsune.lazy.advance import arrive, rewrite
from kitsune.lazy.cell import Cell, Moved, Ref, is_leaf, may_defer, ref, serial_of
from kitsune.lazy.edges import begin_of, bytes_before
from kitsune.lazy.growing import Values
from kitsune.lazy.step_ends import Step
from kitsune.lazy.tensor import LazyTensor
from kitsune.lazy.trie import Node


class Region:
    """What was recorded since the last barrier."""

    __slots__ = (
        "admitted",
        "calls",
        "counted",
        "cut",
        "cuts",
        "deferred",
        "dirty",
        "error",
        "firsts",
        "handover",
        "inputs",
        "kept",
        "n_looks",
        "node",
        "observed_from",
        "odd",
        "past",
        "places",
        "plain",
        "produced",
        "real",
        "recorder",
        "scalars",
        "seen",
        "slow",
        "step",
        "storages",
        "values",
    )

    def __init__(self, root: Node, recorder: Any) -> None:
        self.node = root
        self.recorder = recorder
        # Of the ops that were new.
        self.values = Values(root)
        # id(tensor) -> cell. The cell holds the tensor, so the id stays its own while the region is open.
        self.plain: dict[int, Cell] = {}
        self.storages: dict[int, int] = {}
        # (value, tensor) of the wrappers that came in.
        self.inputs: list[tuple[int, torch.Tensor]] = []
        # By storage: the first input there, and how many bytes before it; of storages that others share or were let go of.
        self.firsts: dict[int, tuple[int, int]] = {}
        # Every new value; that of a wrapper which is gone is told by its reference count (`living`).
        self.produced: list[Cell] = []
        # Those of ops that were made at once, which are not kept alive: a step's activations would be.
        self.seen: list[weakref.ref[Cell]] = []
        self.scalars: list[float] = []
        # Storages that it writes: who reads one has to wait. In the order of first writes: those before a call are the first n.
        self.dirty: set[int] = set()
        # Depth from which ops were run at once; None while everything is pending.
        self.observed_from: int | None = None
        # (value, type, storage, undo) of the operands that the op at hand brought in, and why it cannot be recorded.
        self.admitted: list[tuple[int, TensorType, int, Callable[[], Any]]] = []
        self.odd: Barrier | None = None
        # Set with `odd` and `observed_from`: a known op is not to be taken on sight.
        self.slow = False
        # Calls that were followed and still lack their place in the autograd graph; all calls so far that have made a graph,
        # None if they are not known; and whether any of them was made for real, so that autograd has nodes.
        self.calls: list[Any] = []
        self.past: list[Any] | None = []
        self.real = False
        # Writes of calls that were followed while others are owed: how many are, and the tensors; see `write_counts.py`.
        self.counted: list[tuple[int, list[Any]]] = []
        # An update that was followed, unknown to its tensors: its edge, those, and of the new ones the serials of their storages.
        self.deferred: Any = None
        # How far it has been run already, going on, and the values of that part which may still be wanted; see `cuts.py`.
        self.cut: Node | None = None
        self.cuts: list[tuple[Node, int]] = []
        self.kept: dict[int, torch.Tensor] = {}
        # What of it only the part behind the cut sees.
        self.handover: Handover | None = None
        # What the last mask was that torch has counted, its places, and itself (`items.py`); modules seen (`module_calls.py`).
        self.places: Any = None
        self.n_looks, self.step = 0, Step()
        # What went wrong when the region was run: its values were never computed.
        self.error: BaseException | None = None

    def cell(self, tensor: Any) -> Cell:
        """The cell of a tensor that has come in."""
        return tensor.cell if type(tensor) is LazyTensor else self.plain[id(tensor)]

    def cells(self, tensors: Iterable[Any]) -> list[Cell]:
        """The cells of tensors that have come in."""
        plain = self.plain
        return [t.cell if type(t) is LazyTensor else plain[id(t)] for t in tensors]

    def begin(self, cell: Cell) -> int:
        """Where an input begins in its memory. A call that is followed lets it in as if that were the start."""
        begin = begin_of(cell.real)
        if cell.type.offset != begin:
            cell.type = type_of(cell.real)  # type: ignore[arg-type]
        return begin

    def waits(self, cell: Cell) -> bool:
        """Is what a cell of this region stands for pending?"""
        cut = self.cut
        if cut is None:
            return not cell.external or cell.storage in self.dirty
        there = cell.external or (cell.real is not None and cell.ref.id < cut.n_values)
        return self.node is not cut and (not there or cell.storage in self.dirty)

    def see(self, cells: Iterable[Cell]) -> None:
        """These have their values; who still holds them at the end is to be known."""
        self.seen += map(weakref.ref, cells)

    def computed(self) -> list[Cell]:
        """The cells that have their values and are still there. With contexts in each other, another region may have taken in
        what an op that was made at once gave this one, and numbers it."""
        return [cell for seen in self.seen if (cell := seen()) is not None and cell.region is self]

    def refuse(self, reason: Barrier) -> None:
        """The op at hand cannot be recorded."""
        self.odd, self.slow = reason, True

    def adopt(self, cell: Cell) -> Any:
        """A wrapper of an earlier region, or of another recorder's, comes in; returns its key."""
        real = cell.real
        if real is not None and not may_defer(real):
            self.refuse(Barrier.FOREIGN_MEMORY)
            return None
        if real is None:
            try:
                real = cell.region.recorder.materialize(cell, Barrier.OUTSIDE)
            except BaseException:
                self.rollback()
                raise
        before = (cell.region, cell.ref, cell.storage, cell.external, cell.came)
        cell.spent = Moved(cell) if type(cell.spent) is list else cell.spent

        def undo() -> None:
            cell.region, cell.ref, cell.storage, cell.external, cell.came = before

        key, cell.ref, cell.storage = self._number(real, cell.type, undo)
        self.inputs.append((cell.ref.id, real))
        cell.region, cell.external, cell.came = self, True, cell.ref
        return key

    def admit(self, tensor: torch.Tensor) -> Any:
        """A plain tensor comes in; returns its key, or refuses the op."""
        # The key of an update has asked all this of its 600 tensors a moment ago, which takes 6 us each.
        lane = self.recorder.lane
        seen = self.recorder.arrivals.get(id(tensor)) if lane is not None and lane.part_of_update else None
        if seen is not None and not tensor.storage_offset():
            type_ = seen[2][0]
        elif (odd := self.oddness(tensor)) is not None:
            self.refuse(odd)
            return None
        else:
            type_ = type_of(tensor)
        key, number, storage = self._number(tensor, type_, lambda: self.plain.pop(id(tensor), None))
        self.plain[id(tensor)] = Cell(self, number, type_, storage, tensor, number)
        if tensor.requires_grad:
            if is_leaf(tensor):
                self.recorder.leaves.note(tensor)
            else:
                self.recorder.outer_graph = True
        return key

    def rollback(self) -> None:
        """Undo what the key of an op that is not recorded has let in."""
        for _, _, _, undo in reversed(self.admitted):
            undo()
        if self.admitted:
            first, known = self.admitted[0][0], self.node.n_storages
            self.inputs = [(number, tensor) for number, tensor in self.inputs if number < first]
            self.storages = {serial: storage for serial, storage in self.storages.items() if storage < known}
            self.firsts = {storage: first for storage, first in self.firsts.items() if storage < known}
            self.admitted.clear()
        del self.scalars[self.node.n_scalars :]
        self.odd, self.slow = None, self.observed_from is not None

    def unfold(self) -> None:
        """Let the tensors of the region know of the update that was followed: somebody asks for them after all."""
        if self.deferred is not None:
            (edge, flat, serials, fresh), self.deferred = self.deferred, None
            arrive(self, edge, list(zip(serials, fresh, strict=True)))
            rewrite(self, edge, flat)

    def put_inputs(self, values: list[Any]) -> None:
        """Put the tensors that came in where their numbers are."""
        for cell in self.plain.values():
            values[cell.came.id] = cell.real  # type: ignore[union-attr]
        for number, tensor in self.inputs:
            values[number] = tensor
        for number, tensor in self.kept.items():
            values[number] = tensor
        if self.deferred is not None:
            edge, _, _, fresh = self.deferred
            for k, number in edge.places:
                tensor = fresh[k]
                values[number] = tensor if type(tensor) is not LazyTensor else tensor.cell.real

    def let_go(self) -> None:
        """What was recorded so far has been run, so that the wrappers that came in need not be kept."""
        for _, tensor in self.inputs:
            self._first_in(self.storages[serial_of(tensor)])
        self.inputs.clear()

    def extend_past(self, edge: Any) -> None:
        """A call has made a graph; None if it is not known which."""
        if edge is None or self.past is None:
            self.past = None
        else:
            self.past.append(edge)

    def release(self) -> None:
        """The region has ended. Its inputs hold it and it holds them: without this only the garbage collector frees a batch."""
        for cell in self.plain.values():
            cell.region = cell.real = None
        self.plain.clear()
        self.inputs.clear()
        self.produced.clear()
        self.seen.clear()
        self.admitted.clear()
        self.calls.clear()
        self.counted.clear()
        self.kept.clear()
        self.deferred = self.handover = self.places = None

    def is_target(self, device: torch.device) -> bool:
        """Is this the device that is recorded for?"""
        return device in self.recorder.targets

    def _number(self, tensor: torch.Tensor, type_: TensorType, undo: Callable[[], Any]) -> tuple[Any, Ref, int]:
        serial = serial_of(tensor)
        storage = self.storages.get(serial)
        # Which inputs share memory is part of the key, and how they lie to each other there. Where in its memory an input begins
        # is not: minibatch number i is X[i * n : (i + 1) * n].
        type_ = type_.at_start()
        key: Any = type_ if storage is None else (type_, self.where(tensor, storage))
        if storage is None:
            storage = self.storages[serial] = self.n_storages()
        number = ref(self.node.n_values + len(self.admitted))
        self.admitted.append((number.id, type_, storage, undo))
        return key, number, storage

    def where(self, tensor: torch.Tensor, storage: int) -> tuple[int, int | None, int]:
        """Where an input lies in memory that the region knows already: which memory, the first input there, and how many bytes
        after that one. In memory that the region itself has made, there is no input, and they count from its start."""
        number, before = self._first_in(storage) or (None, 0)
        return storage, number, bytes_before(tensor) - before

    def _first_in(self, storage: int) -> tuple[int, int] | None:
        """The number of the first input in a storage, and how many bytes of that are before it."""
        if storage not in self.firsts:
            there = [(c.came.id, c.real) for c in self.plain.values() if c.storage == storage]  # type: ignore[union-attr]
            there += [(number, tensor) for number, tensor in self.inputs if self.storages.get(serial_of(tensor)) == storage]
            if not there:
                return None
            number, tensor = min(there, key=itemgetter(0))
            self.firsts[storage] = number, bytes_before(tensor)  # type: ignore[arg-type]
        return self.firsts[storage]

    def n_storages(self) -> int:
        """How many storages are numbered, those of the op at hand included."""
        n: int = self.node.n_storages
        if not self.admitted:
            return n
        # They are numbered in order, so that the last new one tells: to look at all of them for each of 600 costs 15 ms.
        return next((storage + 1 for _, _, storage, _ in reversed(self.admitted) if storage >= n), n)

    def oddness(self, tensor: torch.Tensor) -> Barrier | None:
        if not is_strided(tensor):
            return Barrier.FOREIGN_LAYOUT
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return Barrier.FOREIGN_TENSOR
        # A scalar on the CPU may take part in an op on another device.
        if not self.is_target(tensor.device) and (tensor.dim() or tensor.device.type != "cpu"):
            return Barrier.OTHER_DEVICE
        return None if may_defer(tensor) else Barrier.FOREIGN_MEMORY


def is_strided(tensor: torch.Tensor) -> bool:
    """Is this a tensor of numbers with strides, and nothing more special?"""
    special = tensor.is_quantized or tensor.is_nested or tensor._is_zerotensor()
    return tensor.layout is torch.strided and not special
