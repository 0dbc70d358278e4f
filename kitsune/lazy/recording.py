"""What is recorded and pending, and how it ends: the barriers, the flush, and who may ask for a value."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import Parameter

from kitsune.ir import Barrier, Graph, Handover, Op, OpRow, OutputSpec, Site, TensorType, type_of
from kitsune.lazy import recorders
from kitsune.lazy.arrivals import Arrivals, Leaves
from kitsune.lazy.casts import begin_anew
from kitsune.lazy.cell import Cell, living, numbers_of, ref, serial_of
from kitsune.lazy.cuts import computed_since, depth_of, go_on, goes_on, judge, keep, keeping, put_kept
from kitsune.lazy.early_reads import EarlyReads, Run, memory_changed
from kitsune.lazy.graphs import Graphs
from kitsune.lazy.outlived import Outlived
from kitsune.lazy.region import Region, is_strided
from kitsune.lazy.settings import saves_through_python, settings
from kitsune.lazy.shield import shield
from kitsune.lazy.sites import user_site
from kitsune.lazy.stream_changes import as_called, called_here, taking
from kitsune.lazy.tensor import LazyTensor, wrap
from kitsune.lazy.trie import Node

PLAIN = frozenset({torch.Tensor, Parameter})


class Recording:
    """The region in progress and the regions known. One per accelerating thread.

    The stages before and after come in as functions: `describe(func)` gives an op's row; `infer(...)` the OutputSpec of a call
    without making it; `below_autograd()` is a context for running kernels; `run(graph, values, scalars, handover)` runs a closed
    region, or a part of one that has two, and returns what it can answer early; `tally` counts; `on_close` hears of each region,
    and if it was observed; `on_growth` of how many more ops are known; `on_plans` of each new op that leaves plans in its thread.
    """

    def __init__(
        self,
        *,
        device: torch.device,
        warmup: int,
        max_ops: int,
        max_bytes: int,
        describe: Callable[[Any], OpRow],
        infer: Callable[..., OutputSpec | None],
        below_autograd: Callable[..., Any],
        run: Callable[[Graph, list[Any], list[float], Handover | None], Any],
        tally: Any,
        on_close: Callable[[Graph, Barrier, Site | None, bool], None],
        on_growth: Callable[[int], None],
        on_plans: Callable[[Op], None],
    ) -> None:
        self.device, self.warmup, self.max_ops, self.max_bytes = device, warmup, max_ops, max_bytes
        self.targets = frozenset({device, torch.device(device.type)})
        self.describe, self.infer, self.below_autograd = describe, infer, below_autograd
        self.run, self.tally, self.on_close, self.on_growth, self.on_plans = run, tally, on_close, on_growth, on_plans
        self.use_lock(recorders.lock)
        # Can another thread record or read here? Autograd has one for each CUDA device. The lock costs 0.25 us per op.
        self.shared, self.paused = True, 0
        # While torch infers for the recorder, or a region runs, its Python may pass a door: a region is not to be run twice.
        self.inferring = self.running = False
        # The call lane; what takes ops in the recorder's place: strays outside of it, or calls that are made again; what hears of
        # all else, while a static function is learned; what makes room for a capture; what gives back memory that is
        # kept; and what hears of the ops that the program begins with.
        nobody: Any = None
        self.lane = self.hook = self.walk = self.watcher = self.stand_aside = self.let_go = self.begins = nobody
        # What becomes of ops that are not known at their place: "record", or leave them to "eager", or "fail".
        self.on_new = "record"
        # Counts the ops that ran beside the region: what they tell may be in the calls' later arguments, unseen by any key.
        self.n_unrecorded = 0
        # The ids of the counts on the host that belong to the update that is being made.
        self.counting: frozenset[int] = frozenset()
        # How often autocast has forgotten its casts of weights, after which op of this region; see `casts.py` for the rest.
        self.epoch, self.cleared, self.writes_in_block, self.graphs_in_block, self.outlived = 0, None, False, False, Outlived()
        # What `torch.set_default_device` has set, or a `with torch.device(...)` around the context.
        self.default_device: Any = None
        self.rows: dict[int, OpRow] = {}
        # The plain tensors that came in, and the first of its tables, which the hot path reads.
        self.known = Arrivals()
        self.arrivals = self.known.tensors
        # The lists that were filled for an update which is still to come; leaves seen that may get a `.grad`, by id.
        self.filled: Any = None
        self.leaves, self.early = Leaves(), EarlyReads(tally)
        self.outer_graph = False  # Came a tensor in whose graph was built outside, from leaves that were not seen?
        self.forget()
        recorders.EVERY.add(self)

    def use_lock(self, lock: Any) -> None:
        """The lock that all recorders share; its methods are bound once: `with` costs 0.1 us more per op."""
        self.lock, self._acquire, self._release = lock, taking(self, lock), lock.release

    def forget(self) -> None:
        """Drop every region seen so far; to be called between regions."""
        self.roots: dict[Any, Node] = {}
        self.specs: dict[Any, OutputSpec] = {}
        self.graphs = Graphs()
        # Ops that once returned something else than their key promised: never recorded again.
        self.unstable: set[Any] = set()
        self.n_nodes = 0
        self.known.clear()
        self.early.forget()
        self.region = self._new_region()
        # The region of wrappers that were made around a tensor that was there already.
        self.nowhere = Region(Node(), self)

    def _new_region(self) -> Region:
        region = Region(self.roots.setdefault((self.default_device, *settings()), Node()), self)
        if saves_through_python():
            region.real, region.past = True, None
        begin_anew(self, getattr(self, "region", None))
        return region

    def restart(self) -> None:
        """A context is entered: what a region depends on besides its ops may have changed since the last one."""
        self.default_device = shield(self)
        called_here(self)
        self.shared = self.device.type != "cpu" or threading.active_count() > 1
        if not self.region.node.depth:
            self.region = self._new_region()

    def settled(self, real: torch.Tensor, type_: TensorType | None = None) -> LazyTensor:
        """A wrapper of a tensor that is already there, of this type if it is known."""
        return wrap(Cell(self.nowhere, ref(0), type_ or type_of(real), -1, real))

    def is_pending(self, tensor: Any) -> bool:
        """Would reading the tensor's memory now give another value than after the region?"""
        region = self.region
        region.unfold()
        if type(tensor) is LazyTensor:
            cell = tensor.cell
            if cell.region is region:
                return region.waits(cell)
            tensor = cell.real
        written = bool(region.dirty) and region.node is not region.cut and _has_memory(tensor)
        return written and region.storages.get(serial_of(tensor)) in region.dirty

    def takes_part(self, tensor: Any) -> bool:
        """Does the region read or write the tensor's memory?"""
        self.region.unfold()
        if type(tensor) is LazyTensor:
            if tensor.cell.region is self.region:
                return True
            tensor = tensor.cell.real
        return bool(self.region.storages) and _has_memory(tensor) and serial_of(tensor) in self.region.storages

    def before_door(self, tensor: torch.Tensor, cause: Barrier) -> None:
        """Somebody asks for the memory of a tensor and may write it: a region that has to do with it ends."""
        memory_changed()
        with self.lock:
            if self.watcher is not None and not self.running:
                self.watcher.flushes(cause)
            if self.region.node.depth and self.takes_part(tensor):
                self.flush(cause)

    def before_random(self) -> None:
        """A generator's state is about to be read or set."""
        with self.lock:
            if self.watcher is not None:
                self.watcher.flushes(Barrier.RANDOM_STATE)
            if self.region.node.random:
                self.flush(Barrier.RANDOM_STATE)

    def materialize(self, cell: Cell, cause: Barrier) -> torch.Tensor:
        """The computed tensor of a cell, whose region ends if it is still open."""
        memory_changed()
        with self.lock:
            self.region.unfold()
            if self.watcher is not None:
                self.watcher.flushes(cause)
            if cell.region is self.region and self.region.waits(cell):
                self.flush(cause)
            elif cell.real is not None:
                # Any open region may be about to write this memory, through another tensor.
                for recording in {self, *recorders.OPEN}:
                    recording.before_door(cell.real, cause)
            if cell.real is None:
                raise RuntimeError(
                    "this tensor has no value: an operator recorded before it failed when its region was run"
                ) from cell.region.error
            return cell.real

    def take_leaves(self) -> list[torch.Tensor]:
        """Take the leaves that came in since this was last done, and are still alive."""
        leaves, self.outer_graph = self.leaves.living(), False
        self.leaves.clear()
        return leaves

    def stand_for(self, wrapper: LazyTensor, real: torch.Tensor) -> None:
        """Let a wrapper stand for another tensor on its device, whose geometry and dtype it takes on."""
        fresh = self.settled(real)
        with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
            torch._C.TensorBase.data.__set__(wrapper, fresh)  # type: ignore[attr-defined]
        wrapper.cell = fresh.cell

    def flush(self, cause: Barrier, end: bool = True) -> None:
        """Close the region: run what is pending, give every living wrapper its value, and start the next region."""
        with self.lock:
            region, node = self.region, self.region.node
            if self.inferring or self.running:
                return
            if self.watcher is not None:
                self.watcher.flushes(cause)
            self.filled = None
            if not node.depth:
                return
            self.outlived.before_run(self)
            site = user_site()
            self.tally.flushed[(cause, site)] += 1
            if end and goes_on(region, cause):
                return go_on(self, region, cause, site)
            if region.calls and self.lane is not None:
                self.lane.region_ends(region, end)
            self.early.ends(region)
            if end:
                self._end(region, cause, site)
            elif region.observed_from is None:
                self.tally.recorded += node.depth - depth_of(region.cut)
                self.run_so_far(region)

    def _end(self, region: Region, cause: Barrier, site: Site | None) -> None:
        judge(region)
        self.region = self._new_region()
        if observed := region.observed_from is not None:
            self.tally.observed += region.node.depth - region.observed_from
            live = numbers_of(computed_since(region))
            region.release()
        else:
            self.tally.recorded += region.node.depth - depth_of(region.cut)
            live = self.run_so_far(region)
        self.closed(region.node, live, cause, site, observed, region.cut)
        if self.n_nodes > 5 * self.max_ops:
            # A program that never repeats (1,000 batch sizes) would keep a path for each of its regions.
            self.forget()

    def run_so_far(self, region: Region, saved: frozenset[int] | None = None, left: Sequence[Any] = ()) -> tuple[int, ...]:
        """Compute what is pending; returns the numbers of what can be read, not by `left`. With `saved`, kept too, it goes on."""
        # Wider than the path: at a divergence the next op has brought its operands in already.
        values: list[Any] = [None] * (region.node.n_values + len(region.admitted))
        cells: list[Cell] = []
        try:
            cells = living(region.produced, left)
            live = keeping(region, cells, saved) if saved else numbers_of(cells)
            region.put_inputs(values)
            self.running = True
            graph, alone = self.graphs.get(region.node, live, region.cut), self.watcher is None
            run = self.early.run_of(region.node, graph, values) if alone else Run(graph)
            put_kept(region, run.graph, values, alone and region is not self.region)
            whole = alone and saved is None and region.cut is None
            if region.node is not region.cut and not (whole and self.early.foreseen(region, live, values)):
                self._run_now(region, run, values)
        except BaseException as error:
            region.error = error
            if region is self.region:
                self.region = self._new_region()
            raise
        finally:
            self.running = False
            for cell in cells:
                cell.real = values[cell.ref.id]
            region.produced.clear()
            region.see(cells)
            if saved is not None and region is self.region:
                keep(region, live, cells, values)
            elif region is self.region:
                region.let_go()
            else:
                region.release()
        return live

    def _run_now(self, region: Region, run: Run, values: list[Any]) -> None:
        graph, scalars, n = run.graph, region.scalars, region.node.n_values
        # The next op's operands are no part of it; a plan, and what is foreseen, have values of their own under their numbers.
        values[n:] = [None] * (len(values) - n)
        with as_called(self):
            if self.watcher is None:
                return self.early.ran(region.node, run, values, self.run(graph, values, scalars, region.handover))
            memory_changed()
            self.run(graph, values, scalars, None)
        self.watcher.ran(graph, [(v.id, values[v.id]) for v in graph.inputs], values, scalars)

    def closed(
        self, node: Node, live: tuple[int, ...], cause: Barrier, site: Site | None, observed: bool, since: Node | None
    ) -> None:
        """A region has been run so far, from the node after which it began."""
        if node is since:
            return
        node.tallies = node.tallies or {}
        node.tallies[since] = self.tally.close(node.tallies.get(since), node.depth - depth_of(since), cause, site)
        graph = self.graphs.get(node, live, since)
        if self.watcher is not None:
            self.watcher.closed(graph)
        elif observed:  # It will be made ready as it is going to be run.
            graph = self.early.run_of(node, graph, []).graph
        self.on_close(graph, cause, site, observed)


def _has_memory(tensor: Any) -> bool:
    return type(tensor) in PLAIN and is_strided(tensor)
