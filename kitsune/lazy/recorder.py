"""The recorder: matches each op against the regions known, and closes the region in progress at a barrier."""

import dataclasses
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn import Parameter

from kitsune.ir import Barrier, Graph, Kind, Operand, OpRow, OutputSpec, Site, describe_result, type_of
from kitsune.lazy.cell import Cell, ref, serial_of
from kitsune.lazy.graphs import graph_of
from kitsune.lazy.rebuild import fill, replace_tensors, tensors_in, without_numbers
from kitsune.lazy.region import Region
from kitsune.lazy.sites import user_site
from kitsune.lazy.tensor import LazyTensor, wrap
from kitsune.lazy.trie import GENERAL, ONE, SELF, Node, agrees, grow, written_operands

PLAIN = (torch.Tensor, Parameter)
# Constants that compare and hash as they mean. Booleans and floats do not: 1 == True == 1.0.
CONSTANTS = frozenset({int, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format})
MASKS = (torch.bool, torch.uint8)
TRUE, FALSE, FLOAT, RECORD = object(), object(), object(), object()


class Call(NamedTuple):
    """One aten call on its way in: `tensors` are its operands in order."""

    row: OpRow
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    key: tuple[Any, ...]
    tensors: list[Any]


class Recorder:
    """One per accelerating thread. The stages before and after come in as functions, put together by the pipeline.

    `describe(func)` gives an op's row; `infer(...)` the OutputSpec of a call without making it; `below_autograd()` is a context
    for running kernels; `run(graph, values, scalars)` runs a closed region; `tally` counts; `on_close` hears of each region.
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
        below_autograd: Callable[[], Any],
        run: Callable[[Graph, list[Any], list[float]], None],
        tally: Any,
        on_close: Callable[[Graph, Barrier, Site | None], None],
    ) -> None:
        self.device = device
        self.warmup = warmup
        self.max_ops, self.max_bytes = max_ops, max_bytes
        self.describe, self.infer, self.below_autograd = describe, infer, below_autograd
        self.run, self.tally, self.on_close = run, tally, on_close
        self.renew_lock()
        self.paused = 0
        self.rows: dict[int, OpRow] = {}
        # Leaves seen that may get a `.grad`, by id.
        self.leaves: dict[int, weakref.ref[torch.Tensor]] = {}
        self.forget()

    def renew_lock(self) -> None:
        """A new lock: in a forked child, the old one may be held by a thread that is not there."""
        self.lock = threading.RLock()
        # Bound once: `with` costs 0.1 us more per op.
        self._acquire, self._release = self.lock.acquire, self.lock.release

    def forget(self) -> None:
        """Drop every region seen so far; to be called between regions."""
        self.roots: dict[torch.dtype, Node] = {}
        self.specs: dict[Any, OutputSpec] = {}
        self.graphs: dict[Any, Graph] = {}
        # Ops that once returned something else than their key promised: never recorded again.
        self.unstable: set[Any] = set()
        self.n_nodes = 0
        self.region = self._new_region()
        # The region of wrappers that were made around a tensor that was there already.
        self.nowhere = Region(Node(), self)

    def _new_region(self) -> Region:
        # Results of factories and of int * float depend on the default dtype, which no op shows.
        return Region(self.roots.setdefault(torch.get_default_dtype(), Node()), self)

    # ---- one op ----

    def record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Any:
        """Take one aten call; returns placeholders, or results where the call is made at once.

        The hot path: a known op must cost less than 6 us more than in eager (`benchmarks/bench_dispatch.py`).
        """
        self._acquire()
        try:
            # By id, since OpOverload hashes in Python. The row keeps the overload, and so its id.
            row = self.rows.get(id(func)) or self._row_of(func)
            if row.detour and (returned := self._detour(row, args, kwargs or {})) is not RECORD:
                return returned
            region = self.region
            key: list[Any] = [row]
            append = key.append
            for a in args:
                cls = type(a)
                if cls is LazyTensor:
                    cell = a.cell
                    append(cell.ref if cell.region is region else region.adopt(cell))
                elif cls is torch.Tensor or cls is Parameter:
                    known = region.plain.get(id(a))
                    append(known.ref if known is not None else region.admit(a))
                elif cls in CONSTANTS:
                    append(a)
                else:
                    append(self._key_of(a, row))
            if kwargs:
                for name, a in kwargs.items():
                    append(name)
                    append(self._key_of(a, row))
            if row.kind is Kind.EXTERN:
                append(TRUE if torch.is_grad_enabled() else FALSE)
            whole = tuple(key)
            node = region.node.children.get(whole)
            if node is None or region.slow or not node.known:
                return self._first_sight(Call(row, args, kwargs or {}, whole, tensors_in((args, kwargs))), node)
            if node.make is None or node.full:
                return self._emit(node, tensors_in((args, kwargs)))
            if region.admitted:
                region.admitted.clear()
            region.node = node
            wrapper = node.make()
            wrapper.cell = cell = Cell(region, *node.results[0])
            region.produced.append(weakref.ref(cell))
            return wrapper
        finally:
            self._release()

    def _emit(self, node: Node, tensors: list[Any], reals: list[torch.Tensor] | None = None) -> Any:
        """Step to `node` and return its placeholders, which already have their values if `reals` are given."""
        region = self.region
        region.admitted.clear()
        region.node = node
        for operand, _, after, storage in node.written:
            region.cell(tensors[operand]).ref = after
            region.dirty.add(storage)
        made = []
        for number, type_, storage in node.results:
            cell = Cell(region, number, type_, storage)
            if reals is None:
                region.produced.append(weakref.ref(cell))
            else:
                cell.real = reals[len(made)]
                region.storages.setdefault(serial_of(cell.real), storage)
            made.append(wrap(cell))
        if node.form == ONE:
            returned = made[0]
        elif node.form == SELF:
            returned = tensors[node.structure.index]
        else:
            returned = fill(node.structure, made, tensors) if node.form == GENERAL else None
        if node.full:
            self.flush(Barrier.BOUND)
        return returned

    def _key_of(self, a: Any, row: OpRow) -> Any:
        """The key of an argument of any type; refuses the op where there is none."""
        cls = type(a)
        region = self.region
        if cls is LazyTensor:
            return a.cell.ref if a.cell.region is region else region.adopt(a.cell)
        if cls in PLAIN:
            known = region.plain.get(id(a))
            return known.ref if known is not None else region.admit(a)
        if cls in CONSTANTS:
            if cls is torch.device and not region.is_target(a):
                region.refuse(Barrier.OTHER_DEVICE)
            elif cls is torch.layout and a is not torch.strided:
                region.refuse(Barrier.FOREIGN_LAYOUT)
            return a
        if cls is bool:
            return TRUE if a else FALSE
        if cls is float:
            if not row.scalars_move:
                return ("float", a.hex())
            region.scalars.append(a)
            return FLOAT
        if isinstance(a, (list, tuple)):
            return (cls, *[self._key_of(x, row) for x in a])
        if cls is complex:
            return ("complex", a.real.hex(), a.imag.hex())
        if isinstance(a, torch.Tensor):
            region.refuse(Barrier.FOREIGN_TENSOR)
        else:
            region.refuse(Barrier.GENERATOR if isinstance(a, torch.Generator) else Barrier.UNSUPPORTED)
        return None

    def _row_of(self, func: Any) -> OpRow:
        row = self.describe(func)
        if self.paused:
            return dataclasses.replace(row, detour=True)
        self.rows[id(func)] = row
        return row

    def pause(self) -> None:
        """Pass everything through until `resume`; may be nested."""
        self.paused += 1
        self.rows = {}

    def resume(self) -> None:
        """Undo one `pause`."""
        self.paused -= 1

    def _detour(self, row: OpRow, args: Any, kwargs: Any) -> Any:
        """What an op needs that may not be recorded: its result, or RECORD where it is recorded after all."""
        if self.paused:
            return self._pass_through(row, args, kwargs, Barrier.PAUSED)
        if row.barrier is not None:
            return self._pass_through(row, args, kwargs, row.barrier)
        return self._pass_through(row, args, kwargs, Barrier.HOST_SCALAR) if self._is_host_counter(args) else RECORD

    def _is_host_counter(self, args: tuple[Any, ...]) -> bool:
        """`step += 1` on a CPU tensor of an optimizer: done at once, or reading each step count would end a region."""
        first = args[0]
        if type(first) is not torch.Tensor or first.dim() or self.device.type != "cpu":
            return False
        return all(type(a) in (int, float) for a in args[1:]) and not self._takes_part(first)

    # ---- first sight ----

    def _first_sight(self, call: Call, node: Node | None) -> Any:
        reason = self._why_not(call)
        if reason is not None:
            self.region.rollback()
            return self._pass_through(call.row, call.args, call.kwargs, reason)
        if self.warmup or self.region.observed_from is not None:
            return self._observe(call, node)
        return self._record_new(call)

    def _why_not(self, call: Call) -> Barrier | None:
        """Why a call cannot be part of a region."""
        region, named = self.region, call.kwargs.get("device")
        on_target = any(region.is_target(t.device) for t in call.tensors)
        if region.odd is Barrier.OTHER_DEVICE and on_target:
            return Barrier.HOST_COPY
        if region.odd is not None:
            return region.odd
        if call.row.target in self.unstable:
            return Barrier.UNTRUSTED
        if call.row.counts_masks and any(t.dtype in MASKS for t in call.tensors[1:]):
            return Barrier.DATA_DEPENDENT
        if call.kwargs.get("pin_memory"):
            return Barrier.UNSUPPORTED
        # A factory with no device= makes a CPU tensor.
        here = on_target if call.tensors else named is not None or self.device.type == "cpu"
        return None if here else Barrier.OTHER_DEVICE

    def _observe(self, call: Call, node: Node | None) -> Any:
        """Make the call now and record it with its real results."""
        region = self.region
        if region.observed_from is None:
            if region.node.depth:
                self.flush(Barrier.DIVERGED, end=False)
            region.observed_from, region.slow = region.node.depth, True
        try:
            result, reals = self._make(call)
        except BaseException:
            region.rollback()
            raise
        if not _is_recordable(result):
            region.rollback()
            return self._hand_out(call.row, result, call.tensors, reals, Barrier.FOREIGN_LAYOUT)
        spec = describe_result(result, reals, type_of)
        if node is not None and not agrees(node, spec, [region.cell(t) for t in call.tensors]):
            self.unstable.add(call.row.target)
            node = None
        if node is None:
            node = self._grow(call, spec)
        node.sights += 1
        node.known = node.sights >= self.warmup
        region.inputs.clear()
        return self._emit(node, call.tensors, _new_in(result, reals))

    def _record_new(self, call: Call) -> Any:
        """warmup=0: the results' types come from the same call seen elsewhere, from meta tensors, or from making it now."""
        cells = [self.region.cell(t) for t in call.tensors]
        spec_key = without_numbers(call.key, cells)
        spec = self.specs.get(spec_key)
        if spec is None and call.row.trusted:
            places = {id(t): Operand(k) for k, t in reversed(list(enumerate(call.tensors)))}
            args, kwargs = replace_tensors((call.args, call.kwargs), places)
            spec = self.infer(call.row.target, args, kwargs, [(c.type, c.storage) for c in cells], self.device)
            if spec is not None:
                self.specs[spec_key] = spec
        if spec is not None:
            node = self._grow(call, spec)
            node.known = True
            return self._emit(node, call.tensors)
        self.region.rollback()
        self.flush(Barrier.UNTRUSTED)
        result, reals = self._make(call)
        self.tally.observed += 1
        if not _is_recordable(result):
            return self._hand_out(call.row, result, call.tensors, reals, Barrier.FOREIGN_LAYOUT)
        spec = self.specs[spec_key] = describe_result(result, reals, type_of)
        wrappers = [self._settled(real) for real in _new_in(result, reals)]
        return fill(spec.structure, wrappers, call.tensors)

    def _grow(self, call: Call, spec: OutputSpec) -> Node:
        region = self.region
        cells = [region.cell(t) for t in call.tensors]
        node = grow(region, call.row, call.args, call.kwargs, cells, call.tensors, spec)
        node.site = user_site()
        node.full = node.depth >= self.max_ops or node.nbytes > self.max_bytes
        region.node.children[call.key] = node
        self.n_nodes += 1
        return node

    def _settled(self, real: torch.Tensor) -> LazyTensor:
        """A wrapper of a tensor that is already there."""
        cell = Cell(self.nowhere, ref(0), type_of(real), -1)
        cell.real = real
        return wrap(cell)

    # ---- calls made at once ----

    def _make(self, call: Call) -> tuple[Any, list[Any]]:
        return self._call(call.row.target, call.args, call.kwargs, call.tensors)

    def _call(self, func: Any, args: Any, kwargs: Any, tensors: list[Any]) -> tuple[Any, list[Any]]:
        """Make a call on real tensors; returns the result and the operands."""
        reals = [t.cell.real if type(t) is LazyTensor else t for t in tensors]
        by_id = {id(t): real for t, real in zip(tensors, reals, strict=True)}
        real_args, real_kwargs = replace_tensors((args, kwargs), by_id)
        with self.below_autograd():
            return func(*real_args, **real_kwargs), reals

    def _pass_through(self, row: OpRow, args: Any, kwargs: Any, reason: Barrier | None) -> Any:
        """Run an op as eager does, outside of any region; what it needs is flushed first."""
        assert reason is not None
        tensors = tensors_in((args, kwargs))
        # What another library's op writes is not known.
        touched = tensors if row.barrier is Barrier.FOREIGN_NAMESPACE else written_operands(row, args, kwargs)
        if (
            (row.random and self.region.node.random and self.region.observed_from is None)
            or any(self._is_pending(t) for t in tensors)
            or any(self._takes_part(t) for t in touched)
        ):
            self.flush(reason)
        for t in tensors:
            if type(t) is LazyTensor and t.cell.real is None:
                t.cell.region.recorder.materialize(t.cell, reason)
        result, reals = self._call(row.target, args, kwargs, tensors)
        return self._hand_out(row, result, tensors, reals, reason)

    def _hand_out(self, row: OpRow, result: Any, tensors: list[Any], reals: list[Any], reason: Barrier) -> Any:
        if reason is not Barrier.PROFILER:
            self.tally.passed_through[(reason, str(row.target))] += 1
        back = {id(real): t for real, t in zip(reals, tensors, strict=True) if type(t) is LazyTensor}
        if row.barrier in (Barrier.METADATA, Barrier.OUT_VARIANT):
            for wrapper in back.values():
                self._follow_metadata(wrapper)
        return replace_tensors(result, back) if back else result

    def _follow_metadata(self, wrapper: LazyTensor) -> None:
        """Give a wrapper the geometry that an in-place op has given its tensor."""
        cell = wrapper.cell
        assert cell.real is not None
        if type_of(cell.real) is not cell.type:
            fresh = self._settled(cell.real)
            with torch._C._DisableTorchDispatch(), self.below_autograd():
                torch.ops.aten.set_.source_Tensor(wrapper, fresh)
            wrapper.cell = fresh.cell

    def run_outside(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An op on a wrapper in a thread, or at a time, in which nothing is recorded."""
        with self.lock:
            return self._pass_through(self.describe(func), args, kwargs, Barrier.OUTSIDE)

    # ---- barriers ----

    def _is_pending(self, tensor: Any) -> bool:
        """Would reading the tensor's memory now give another value than after the region?"""
        region = self.region
        if type(tensor) is LazyTensor:
            cell = tensor.cell
            if cell.region is region:
                return not cell.external or cell.storage in region.dirty
            tensor = cell.real
        return bool(region.dirty) and _has_memory(tensor) and region.storages.get(serial_of(tensor)) in region.dirty

    def _takes_part(self, tensor: Any) -> bool:
        """Does the region read or write the tensor's memory?"""
        if type(tensor) is LazyTensor:
            if tensor.cell.region is self.region:
                return True
            tensor = tensor.cell.real
        return bool(self.region.storages) and _has_memory(tensor) and serial_of(tensor) in self.region.storages

    def before_door(self, tensor: torch.Tensor, cause: Barrier) -> None:
        """Somebody asks for the memory of a tensor and may write it: a region that has to do with it ends."""
        with self.lock:
            if self.region.node.depth and self._takes_part(tensor):
                self.flush(cause)

    def before_random(self) -> None:
        """A generator's state is about to be read or set."""
        with self.lock:
            if self.region.node.random:
                self.flush(Barrier.RANDOM_STATE)

    def materialize(self, cell: Cell, cause: Barrier) -> torch.Tensor:
        """The computed tensor of a cell, whose region ends if it is still open."""
        with self.lock:
            if cell.region is self.region and (not cell.external or cell.storage in self.region.dirty):
                self.flush(cause)
            elif cell.real is not None:
                self.before_door(cell.real, cause)
            if cell.real is None:
                raise RuntimeError(
                    "this tensor has no value: an operator recorded before it failed when its region was run"
                ) from cell.region.error
            return cell.real

    def take_leaves(self) -> list[torch.Tensor]:
        """The leaves that came in since the last call and are still alive."""
        leaves = [leaf for known in self.leaves.values() if (leaf := known()) is not None]
        self.leaves.clear()
        return leaves

    def replace_data(self, tensor: LazyTensor, value: torch.Tensor) -> None:
        """`wrapper.data = value`: from now on the wrapper stands for the value's memory."""
        with self.lock:
            self.flush(Barrier.DOOR)
            real = value.cell.region.recorder.materialize(value.cell, Barrier.DOOR) if type(value) is LazyTensor else value.detach()
            fresh = self._settled(real)
            torch._C.TensorBase.data.__set__(tensor, fresh)  # type: ignore[attr-defined]
            tensor.cell = fresh.cell

    def flush(self, cause: Barrier, end: bool = True) -> None:
        """Close the region: run what is pending, give every living wrapper its value, and start the next region."""
        with self.lock:
            region, node = self.region, self.region.node
            if not node.depth:
                return
            site = user_site()
            self.tally.flushed[(cause, site)] += 1
            if end:
                self.region = self._new_region()
            if region.observed_from is None:
                self.tally.recorded += node.depth
                self._run(region, cause, site)
            elif end:
                self.tally.observed += node.depth - region.observed_from
                self._close(node, (), cause, site)
            if end and self.n_nodes > 20 * self.max_ops:
                # A program that never repeats (1,000 batch sizes) would keep a path for each of its regions.
                self.forget()

    def _run(self, region: Region, cause: Barrier, site: Site | None) -> None:
        # The region holds its results weakly: a cell that is gone is a value that nobody can read.
        cells = [cell for made in region.produced if (cell := made()) is not None]
        live = tuple(sorted({cell.ref.id for cell in cells}))
        graph = self._close(region.node, live, cause, site)
        # Wider than the path: at a divergence the next op has brought its operands in already.
        values: list[Any] = [None] * (region.node.n_values + len(region.admitted))
        for number, tensor in region.inputs:
            values[number] = tensor
        try:
            self.run(graph, values, region.scalars)
        except BaseException as error:
            region.error = error
            raise
        finally:
            for cell in cells:
                cell.real = values[cell.ref.id]
            region.produced.clear()
            region.inputs.clear()

    def _close(self, node: Node, live: tuple[int, ...], cause: Barrier, site: Site | None) -> Graph:
        if node.ends:
            self.tally.recognised += 1
        node.ends += 1
        graph = self.graphs.get((node, live))
        if graph is None:
            graph = self.graphs[(node, live)] = graph_of(node, live)
        self.tally.close(node, cause, site)
        self.on_close(graph, cause, site)
        return graph


def _is_recordable(result: Any) -> bool:
    return all(type(t) in PLAIN and t.layout is torch.strided and not t._is_zerotensor() for t in tensors_in(result))


def _new_in(result: Any, operands: list[Any]) -> list[torch.Tensor]:
    known = {id(t) for t in operands}
    return [t for t in tensors_in(result) if id(t) not in known]


def _has_memory(tensor: Any) -> bool:
    return isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided and type(tensor) in PLAIN
