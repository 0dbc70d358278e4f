"""Reads that need not wait: values that a program reads as numbers are computed first, and sent to the host at once.

What comes next may be foreseen, too: where a region that ends with a read was followed by a small one that only asks another
question of its results (`isnan(loss)`, then `isinf(loss)`), the first is run with both, and the second needs no run.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import torch

from kitsune.ir import Graph, n_values
from kitsune.lazy.foresight import Foresight, foresight, with_foresight
from kitsune.lazy.tensor import LazyTensor
from kitsune.lazy.trie import ONE, Node

ITEM = torch.ops.aten._local_scalar_dense.default
# Numbers of one region that are sent early.
MAX_AWAITED = 8
# Ends of a region in a row after which its value was read, so that it is expected from then on.
IN_A_ROW = 2
# Times that something else came than was foreseen, after which nothing is.
MAX_MISSES = 3
# Sets of values alive at the end of one region that are told apart.
MAX_RUNS = 64
# Counts the events after which a tensor may hold something else: runs of regions and writes beside them, on any thread.
_changes = itertools.count(1)
_last_change = 0


def memory_changed() -> None:
    """Tensors may hold something else from now on."""
    global _last_change
    _last_change = next(_changes)


def last_change() -> int:
    """As long as this is the same number, no memory has changed."""
    return _last_change


@dataclass(frozen=True, slots=True)
class Run:
    """What is run for a graph: the outputs of one element that were recorded, and the first number of what was foreseen."""

    graph: Graph
    small: tuple[int, ...] = ()
    base: int = 0
    n_values: int = 0


class Reads:
    """What is read of the regions that end at one node: `numbers` are the values that are sent early."""

    __slots__ = ("asked", "foresight", "graphs", "n_ends", "n_misses", "numbers")

    def __init__(self) -> None:
        self.numbers: tuple[int, ...] = ()
        self.n_ends = self.n_misses = 0
        # The end after which a value was last read, and how many ends in a row it was, by number.
        self.asked: dict[int, tuple[int, int]] = {}
        self.foresight: Foresight | None = None
        # What is run for a graph as it was recorded.
        self.graphs: dict[Graph, Run] = {}

    def expect(self, number: int) -> None:
        """Send a value early from now on."""
        if number not in self.numbers and len(self.numbers) < MAX_AWAITED:
            self.numbers += (number,)
            self.graphs.clear()

    def foresee(self, foresight: Foresight | None) -> None:
        """Run what is expected to follow, too."""
        self.foresight = foresight
        self.graphs.clear()


class EarlyReads:
    """The reads of one recorder. `on` is whether anything is done about them."""

    def __init__(self, tally: Any) -> None:
        self.tally, self.on = tally, True
        self.forget()

    def forget(self) -> None:
        """Let go of what has been run."""
        # What the run before is known to give, and what it was; they hold as long as no memory has changed.
        self.answers: Any = None
        self._stamp = 0
        # The region that has ended last.
        self._ended: Any = None
        # Of the run before: its reads, its results of one element, and what the next region is foreseen to give.
        self._before: tuple[Reads, dict[int, torch.Tensor]] | None = None
        self._foreseen: tuple[Foresight, dict[int, torch.Tensor], dict[int, torch.Tensor]] | None = None

    def asks(self, tensor: Any, region: Any) -> None:
        """The program asks for a number, while `region` is open."""
        if not self.on or type(tensor) is not LazyTensor:
            return
        cell = tensor.cell
        # `equal` and `_is_all_true` look at tensors of any size, which are no number.
        if cell.external or cell.type.conj or cell.type.neg or cell.type.shape.numel() != 1:
            return
        if cell.region is region:
            # It is what the region ends for.
            reads_of(region.node).expect(cell.ref.id)
        elif cell.region is self._ended:
            reads = reads_of(cell.region.node)
            last, in_a_row = reads.asked.get(cell.ref.id, (-1, 0))
            in_a_row += last != reads.n_ends
            reads.asked[cell.ref.id] = reads.n_ends, in_a_row if last >= reads.n_ends - 1 else 1
            if reads.asked[cell.ref.id][1] >= IN_A_ROW:
                reads.expect(cell.ref.id)

    def ends(self, region: Any) -> None:
        """A region ends."""
        self._ended = region
        if region.node.reads is not None:
            region.node.reads.n_ends += 1

    def answer(self, row: Any, tensor: Any) -> Any:
        """The number that a tensor holds, waited for no longer than needed; None if it has to be read from the device."""
        if self.answers is None or self._stamp != _last_change or row.target is not ITEM or type(tensor) is not LazyTensor:
            return None
        with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
            number = self.answers.to(tensor.cell.real)
        self.tally.answered += number is not None
        return number

    def foreseen(self, region: Any, live: tuple[int, ...], values: list[Any]) -> bool:
        """Has a region been run with the one before? Then `values` gets its results."""
        foreseen, self._foreseen = self._foreseen, None
        before, self._before = self._before, None
        if foreseen is not None and before is not None and self._stamp == _last_change:
            foresight, operands, results = foreseen
            if foresight.is_of(region, live) and all(values[n] is tensor for n, tensor in operands.items()):
                for number, tensor in results.items():
                    values[number] = tensor
                self.tally.foreseen += 1
                return True
            before[0].n_misses += 1
            if before[0].n_misses >= MAX_MISSES:
                before[0].foresee(None)
        self._learn(region, live, values, before)
        self.answers = None
        return False

    def made_before(self, recorder: Any, edge: Any, call: Any) -> Any:
        """What a call returns that would lead along `edge` from the root of a region, if that was run with the one before."""
        if self._foreseen is None:
            return None
        foresight, operands, results = self._foreseen
        if edge.node is not foresight.node or edge.form != ONE or edge.graded or edge.derived or recorder.watcher is not None:
            return None
        found, fresh = results.get(edge.made[0].ref.id), [tensor for _, tensor in call.new()]
        with recorder.lock:
            if self._stamp != _last_change or found is None:
                return None
            if any(type(fresh[k]) is not LazyTensor or operands.get(n) is not fresh[k].cell.real for k, n in edge.places):
                return None
            self._foreseen = self._before = None
        self.tally.foreseen += 1
        return recorder.settled(found, edge.made[0].type)

    def _learn(self, region: Any, live: tuple[int, ...], values: list[Any], before: Any) -> None:
        """Could this region have been run with the one before?"""
        if before is None or self._stamp != _last_change or before[0].n_misses >= MAX_MISSES or before[0].foresight is not None:
            return
        reads, known = before
        by_id = {id(tensor): number for number, tensor in known.items()}
        numbers = [cell.came.id for cell in region.plain.values()] + [number for number, _ in region.inputs]
        sources = {number: by_id[id(values[number])] for number in numbers if id(values[number]) in by_id}
        if len(sources) == len(numbers) and (found := foresight(region, live, sources)) is not None:
            reads.foresee(found)

    def run_of(self, node: Node, recorded: Graph, values: list[Any]) -> Run:
        """What is run in place of a graph as it was recorded; `values` gets room for it."""
        reads = node.reads
        if reads is None or not self.on or not reads.numbers:
            return Run(recorded)
        run = reads.graphs.get(recorded)
        if run is None:
            if len(reads.graphs) >= MAX_RUNS:
                reads.graphs.clear()
            graph = with_foresight(recorded, reads.numbers, reads.foresight)
            small = tuple(v.id for v in recorded.outputs if v.type.shape.numel() == 1)
            run = reads.graphs[recorded] = Run(graph, small, n_values(recorded), n_values(graph))
        values.extend([None] * (run.n_values - len(values)))
        return run

    def ran(self, node: Node, run: Run, values: list[Any], answers: Any) -> None:
        """A region was run, or a part of one: what is known of its results, and of what may come next."""
        memory_changed()
        self.answers, self._stamp = answers, _last_change
        # What was foreseen before it does not know what it has written; and what is held until the next replay is moved then.
        self._before = self._foreseen = None
        reads = node.reads
        if not run.n_values or reads is None:
            return
        small = {number: values[number] for number in run.small}
        self._before = reads, small
        foresight = reads.foresight
        if foresight is not None and run.n_values > run.base:
            operands = {number: small[source] for number, source in foresight.sources.items()}
            results = {v.id: values[run.base + v.id] for v in foresight.graph.outputs}
            self._foreseen = foresight, operands, results


def reads_of(node: Node) -> Reads:
    """The reads of the regions that end at a node."""
    if node.reads is None:
        node.reads = Reads()
    reads: Reads = node.reads
    return reads
