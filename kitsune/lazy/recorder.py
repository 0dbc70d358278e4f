"""The recorder: matches each op against the regions known."""

import dataclasses
import weakref
from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch.autograd.graph import increment_version
from torch.nn import Parameter

from kitsune.ir import Barrier, OpRow
from kitsune.lazy.advance import adopt
from kitsune.lazy.at_once import pass_through
from kitsune.lazy.cell import Cell, serial_of
from kitsune.lazy.constants import MOVES, UNKNOWN, constant
from kitsune.lazy.first_sight import Call, first_sight
from kitsune.lazy.host_counts import are_counts
from kitsune.lazy.new_state import make_state
from kitsune.lazy.rebuild import fill, tensors_in
from kitsune.lazy.recording import PLAIN, Recording
from kitsune.lazy.strays import take_stray
from kitsune.lazy.tensor import LazyTensor, wrap
from kitsune.lazy.trie import GENERAL, ONE, SELF, Node
from kitsune.lazy.used_again import keep
from kitsune.lazy.views import RECORD, infers, take_view
from kitsune.lazy.wrapped_numbers import take_refused

# Constants that compare and hash as they mean. Booleans and floats do not: 1 == True == 1.0.
CONSTANTS = frozenset({int, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format})
TRUE, FALSE, FLOAT = object(), object(), object()


class Recorder(Recording):
    """Takes the ops of one accelerating thread."""

    # Does an optimizer collect what it updates, and make what is not there yet?
    collecting = False
    # Is a product being made, or a backward? They view what they are given as they need it.
    making = is_shielded = False

    def record(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: C901 - calls cost 0.1 us
        """Take one aten call; returns placeholders, or results where the call is made at once.

        The hot path: a known op must cost less than 6 us more than in eager (`benchmarks/bench_dispatch.py`).
        """
        shared = self.shared
        if shared:
            self._acquire()
        try:
            if self.hook is not None:
                return take_stray(self, func, types, args, kwargs)
            # By id, since OpOverload hashes in Python. The row keeps the overload, and so its id.
            row = self.rows.get(id(func)) or self._row_of(func)
            from_outside = False
            if row.detour:
                first = args[0] if args else None
                if (
                    row.barrier is not None
                    or type(first) is not LazyTensor
                    or (row.composite and infers())
                    or (row.is_view and (first.cell.external or first.cell.region is not self.region or infers()))
                ):
                    returned = self._detour(row, args, kwargs or {})
                    if returned is not RECORD:
                        return returned
                    from_outside = row.is_view
            if self.walk is not None:
                return self.walk.take(row, tensors_in((args, kwargs)))
            region = self.region
            key: list[Any] = [row]
            append = key.append
            for a in args:
                cls = type(a)
                if cls is LazyTensor:
                    cell = a.cell
                    append(cell.ref if cell.region is region else adopt(region, a))
                elif cls is Tensor or cls is Parameter:
                    known = region.plain.get(id(a))
                    append(known.ref if known is not None else region.admit(a))
                elif cls in CONSTANTS:
                    append(a)
                elif cls is float and row.scalars_move:
                    region.scalars.append(a)
                    append(FLOAT)
                else:
                    append(self._key_of(a, row))
            if kwargs:
                for name, a in kwargs.items():
                    append(name)
                    append(self._key_of(a, row))
            if row.sees_grad_mode:
                append(TRUE if is_grad_enabled() else FALSE)
            elif (
                from_outside
                and args
                and isinstance(args[0], Tensor)
                and not region.odd
                and (cell := region.cell(args[0])).external
            ):
                # Inputs are known without the offset of their first element; a view's own counts from there.
                append(region.begin(cell))
            whole = tuple(key)
            node = region.node.children.get(whole)
            if node is None or region.slow or not node.known:
                tensors = tensors_in((args, kwargs)) if kwargs else tensors_in(args)
                return first_sight(self, Call(row, args, kwargs or {}, whole, tensors), node)
            if region.admitted:
                region.admitted.clear()
            make = node.make
            if make is not None:
                wrapper: LazyTensor = make()
                number, type_, storage = node.result
                wrapper.cell = cell = Cell(region, number, type_, storage)
                region.produced.append(cell)
                if self.region is not region:
                    # A finalizer that ran in between has flushed: the op belongs to the region that is open now.
                    return self.record(func, types, args, kwargs)
                region.node = node
            elif node.rewrites is not None and type(args[0]) is LazyTensor:
                wrapper = args[0]
                wrapper.cell.ref = node.rewrites
                region.dirty.add(node.storage)
                region.node = node
            else:
                return self.emit(node, tensors_in((args, kwargs)))
            if node.full and node.full is Barrier.BOUND:
                self.flush(Barrier.BOUND)
            return wrapper
        except BaseException as error:
            # Also an interrupt between two lines of this: nothing of the op may stay in the region.
            self.region.rollback()
            return take_refused(self, error, func, args, kwargs)
        finally:
            if shared:
                self._release()

    def redo(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Make a call again from above autograd, which did not know yet that its operands have a history."""
        with self.above_autograd():
            return func(*args, **kwargs)

    def above_autograd(self) -> Any:
        """A context for calls that autograd and this recorder are to see; the pipeline's mode has it."""
        raise NotImplementedError

    def casts_inside(self, row: OpRow) -> bool:
        """Is autocast on inside of this op's kernel, and does that matter? Torch excludes it while a mode handles an op."""
        if row.barrier is not Barrier.CASTS:
            return False
        with torch._C._RestorePythonTLSSnapshot():  # type: ignore[attr-defined]
            return torch.is_autocast_enabled(self.device.type)

    def is_on_top(self) -> bool:
        """Would the next op come here? The pipeline's mode knows."""
        raise NotImplementedError

    def after_follow(self) -> None:
        """The region has grown by a whole call."""
        if cause := self.region.node.full:
            self.flush(cause)

    def emit(self, node: Node, tensors: list[Any], reals: list[torch.Tensor] | None = None) -> Any:
        """Step to `node` and return its placeholders, which already have their values if `reals` are given."""
        region = self.region
        region.admitted.clear()
        region.node = node
        for operand, _, after, storage in node.written:
            region.cell(tensors[operand]).ref = after
            region.dirty.add(storage)
        if reals is None and node.row is not None and node.row.bumps:
            increment_version([tensors[operand] for operand, *_ in node.written])
        made: list[Any] = []
        for number, type_, storage in node.results:
            cell = Cell(region, number, type_, storage)
            if reals is None:
                region.produced.append(cell)
            else:
                cell.real = real = reals[len(made)]
                region.seen.append(weakref.ref(cell))
                region.storages.setdefault(serial_of(real), storage)
            made.append(wrap(cell))
        if node.form == ONE:
            returned = made[0]
        elif node.form == SELF:
            returned = tensors[node.structure.index]
        else:
            returned = fill(node.structure, made, tensors) if node.form == GENERAL else None
        if node.full and node.full is Barrier.BOUND:
            self.flush(Barrier.BOUND)
        return returned

    def _key_of(self, a: Any, row: OpRow) -> Any:  # noqa: C901 - one case per type of argument
        """The key of an argument of any type; refuses the op where there is none."""
        cls = type(a)
        region = self.region
        if cls is LazyTensor:
            return a.cell.ref if a.cell.region is region else adopt(region, a)
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
        special = Barrier.GENERATOR if isinstance(a, torch.Generator) else Barrier.UNSUPPORTED
        region.refuse(Barrier.FOREIGN_TENSOR if isinstance(a, torch.Tensor) else special)
        return None

    def _row_of(self, func: Any) -> OpRow:
        row = self.describe(func)
        if self.paused:
            return dataclasses.replace(row, barrier=Barrier.PAUSED, detour=True)
        if self.collecting:
            row = dataclasses.replace(row, barrier=Barrier.NEW_STATE, detour=True)
        self.rows[id(func)] = row
        return row

    def pause(self) -> None:
        """Pass everything through until `resume`; may be nested."""
        self.paused += 1
        self.rows = {}

    def resume(self, n: int | None = None) -> None:
        """Undo one `pause`, or all but `n`."""
        self.known.forget()
        self.paused = self.paused - 1 if n is None else n

    def _detour(self, row: OpRow, args: Any, kwargs: Any) -> Any:
        """What an op needs that may not be recorded: its result, or RECORD where it is recorded after all."""
        first = args[0] if args else None
        if row.composite and infers():
            # As a whole it would be given other tensors than in eager, and its views be none.
            with self.above_autograd():
                # Not `decompose`: torch has functions in Python for some, which round in another way.
                return row.target._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)
        if row.barrier is Barrier.NEW_STATE:
            return make_state(self, self.describe(row.target), args, kwargs)
        if row.functional is not None and row.barrier is not Barrier.PAUSED and type(first) is LazyTensor:
            return self._reshape(row, args, kwargs)
        if row.barrier is Barrier.ITEM:
            return self._item(row, args, kwargs)
        if row.barrier is not None and (row.barrier is not Barrier.CASTS or self.casts_inside(row)):
            return pass_through(self, row, args, kwargs, row.barrier)
        if row.is_view:
            return take_view(self, row, args, kwargs)
        counts = row.in_place and self._is_host_counter(args)
        return pass_through(self, row, args, kwargs, Barrier.HOST_SCALAR) if counts else RECORD

    def _item(self, row: OpRow, args: Any, kwargs: Any) -> Any:
        """A value is asked for: what is pending must run, unless the value is the same in every step."""
        node, found = self.region.node, constant(self.region, row, args, kwargs)
        if found is not UNKNOWN and found is not MOVES:
            return found
        if found is MOVES:
            self.early.asks(args[0] if args else None, self.region)
        result = pass_through(self, row, args, kwargs, Barrier.ITEM)
        if found is UNKNOWN:
            node.constants[row, args[0].cell.ref] = result
        return result

    def _reshape(self, row: OpRow, args: Any, kwargs: Any) -> Any:
        """`x.squeeze_()` on a wrapper: the view is recorded, and the wrapper stands for it from now on."""
        wrapper = args[0]
        view = self.record(row.functional, (), args, kwargs)
        # A kernel that only moves sizes and strides runs on a tensor without memory too.
        with self.below_autograd(), torch._C._DisableTorchDispatch():
            row.target(*args, **kwargs)
        wrapper.cell = view.cell if type(view) is LazyTensor else self.settled(view).cell
        return wrapper

    def _is_host_counter(self, args: tuple[Any, ...]) -> bool:
        """`step += 1` on CPU tensors of an optimizer: done at once, or reading each step count would end a region."""
        if not args or self.device.type != "cpu":
            return False
        counts, *others = args
        if type(counts) is list:
            # Only where the host reads them: fused optimizers add a plain 1, and their kernel does the reading.
            return len(others) == 1 and are_counts(others) and are_counts(counts) and not any(map(self.takes_part, counts))
        return are_counts([counts]) and all(type(a) in (int, float) for a in others) and not self.takes_part(counts)

    def run_outside(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An op on a wrapper in a thread, or at a time, in which nothing is recorded."""
        keep((args, kwargs))
        with self.lock:
            return pass_through(self, self.describe(func), args, kwargs, Barrier.OUTSIDE)
