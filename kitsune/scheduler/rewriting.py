"""A graph written again op by op, with values in other layouts, or other memory, than were recorded.

What reads such a value follows where its own results stay as they were recorded, or may change as well; a view is a view of the
new memory. Everything else is given a copy in the recorded layout. What somebody outside can see never changes.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from kitsune.ir import (
    Effects,
    Graph,
    Kind,
    Op,
    Operand,
    Result,
    Slot,
    TensorType,
    Value,
    n_values,
    storage_of,
    type_of,
    values_in,
)
from kitsune.scheduler.formats import channels_last, contiguous, is_dense

aten = torch.ops.aten
# Calls that compute the same, whatever the strides of their operands are.
FOLLOWING = {Kind.POINTWISE, Kind.REDUCTION, Kind.GEMM}
# Views that say where in the memory their elements are, and show others where the memory is laid out in another way.
BY_PLACE = {aten.as_strided.default, aten._reshape_alias.default}


class Rewriting:
    """The new graph as it comes about. `now` has, for values by their number, what stands for them."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.ops: list[Op] = []
        self.now: dict[int, Value] = {}
        # Of values that stand for recorded ones: the same contents in the recorded layout, where somebody needed that.
        self.plain: dict[int, Value] = {}
        # Numbers of the values that are copies in another layout.
        self.copied: set[int] = set()
        ends = [v.storage for v in (*graph.inputs, *(v for op in graph.ops for v in op.outputs))]
        self._number, self._storage = n_values(graph), 1 + max(ends, default=-1)
        self._versions: dict[int, int] = {}
        self._views = {v.id: op for op in graph.ops if op.kind is Kind.VIEW for v in op.results}
        # What others can see, and what is written.
        self.seen = {v.storage for v in (*graph.inputs, *graph.outputs)}
        self.written = {storage for op in graph.ops for storage in op.effects.writes}

    def graph_now(self) -> Graph:
        """What has been written."""
        return Graph(self.graph.inputs, tuple(self.ops), self.graph.outputs)

    def value(self, type_: TensorType, storage: int | None = None, version: int = 0) -> Value:
        """A new value, by default in new memory."""
        if storage is None:
            storage, self._storage = self._storage, self._storage + 1
        self._number += 1
        return Value(self._number - 1, type_, storage, version)

    def stands(self, value: Value) -> Value:
        """What stands for a recorded value."""
        return self.now.get(value.id, value)

    def call(self, target: Any, kind: Kind, result: Value, *args: Any, **kwargs: Any) -> Value:
        """Add an op with one result."""
        inputs = tuple(values_in(args))
        derived = kind is Kind.VIEW
        self.ops.append(Op(target, kind, args, tuple(kwargs.items()), inputs, Result(0), (result,), derived=derived))
        return result

    def view(self, target: Any, base: Value, *args: Any) -> Value:
        """Add a view of a value, which must be possible."""
        op = Op(target, Kind.VIEW, (base, *args), (), (base,), Result(0), ())
        types = view_types(op)
        assert types is not None
        return self.call(target, Kind.VIEW, self.value(types[0], base.storage, base.version), base, *args)

    def name(self, target: Any, base: Value, recorded: Value, *args: Any) -> None:
        """Add a view that stands for a recorded value."""
        made = self.view(target, base, *args)
        self.now[recorded.id] = named = replace(recorded, type=made.type, storage=made.storage, version=made.version)
        self.ops[-1] = replace(self.ops[-1], results=(named,))

    def write(self, target: Any, into: Value, *args: Any) -> Value:
        """Add an op that writes its first operand, in new memory; returns what that is afterwards."""
        version = self._versions[into.storage] = self._versions.get(into.storage, 0) + 1
        after = self.value(into.type, into.storage, version)
        inputs = (into, *values_in(args))
        self.ops.append(
            Op(target, Kind.POINTWISE, (into, *args), (), inputs, Operand(0), (), ((into, after),), Effects((into.storage,)))
        )
        return after

    def memory(self, type_: TensorType) -> Value:
        """New memory for others to fill."""
        made = self.call(
            aten.empty.memory_format, Kind.EXTERN, self.value(type_), tuple(type_.shape), dtype=type_.dtype, device=type_.device
        )
        self.ops[-1] = replace(self.ops[-1], allocates=True)
        return made

    def recorded(self, value: Value) -> Value:
        """A value as it was recorded: itself, or a copy of what stands for it. Raises Stuck."""
        if value.id not in self.now:
            return value
        found = self.plain.get(value.id)
        if found is not None:
            return found
        view = self._views.get(value.id)
        if view is not None and view.inputs[0].storage == value.storage:
            base = self.recorded(view.inputs[0])
            made = tuple(self.value(v.type, base.storage, base.version) for v in view.results)
            self.ops.append(reading(view, self.recorded, made))
            self.plain.update((v.id, new) for v, new in zip(view.results, made, strict=True))
        else:
            self.plain[value.id] = self.copy(self.now[value.id], self.value(value.type))
        return self.plain[value.id]

    def copy(self, source: Value, target: Value) -> Value:
        """Add a copy in the layout of the target. Raises Stuck."""
        formats = {contiguous(target.type): torch.contiguous_format}
        if len(target.type.shape) == 4:
            formats.setdefault(channels_last(target.type), torch.channels_last)
        if target.type not in formats:
            raise Stuck(f"a value with strides {target.type.stride} cannot be had by a copy")
        self.copied.add(target.id)
        return self.call(aten.clone.default, Kind.POINTWISE, target, source, memory_format=formats[target.type])

    def follow(self, op: Op) -> None:
        """Add a recorded op, which reads what stands for its operands if it can. Raises Stuck."""
        if not any(v.id in self.now for v in op.inputs):
            self.ops.append(op)
        elif (now := self._following(op)) is not None:
            self.add(op, now)
        elif any(before.id in self.now for before, _ in op.rewritten):
            raise Stuck(f"{op.target} writes it")
        else:
            self.ops.append(reading(op, self.recorded, op.results))
            self._views_of_copies(op)

    def add(self, op: Op, now: Op) -> None:
        """Add what a recorded op has become; its results stand for those that were recorded."""
        pairs = []
        for before, after in op.rewritten:
            stands = self.stands(before)
            if stands is not before:
                after = self.now[after.id] = replace(after, type=stands.type)
            pairs.append((stands, after))
        self.ops.append(replace(now, rewritten=tuple(pairs)) if pairs else now)
        self.now.update((v.id, new) for v, new in zip(op.results, now.results, strict=True) if new is not v)
        if pairs:
            self.out_of_date({after.storage for _, after in pairs})

    def operand(self, op: Op, value: Value) -> Value:
        """What an op would read best for one of its operands."""
        return self.stands(value)

    def types(self, op: Op, now: Op) -> tuple[TensorType, ...] | None:
        """The types of the results of an op that is no view, as `now` reads its operands; None if it must have the recorded ones.

        As long as strides come in the recorded order, so do those of the results. Only where an operand has no gaps would they be
        the operand's own, whatever those are along dimensions of size 1.
        """
        if op.kind not in FOLLOWING or op.effects.random:
            return None
        pairs = zip(op.inputs, now.inputs, strict=True)
        if any(before.type is not after.type and is_dense(after.type) for before, after in pairs):
            return None
        return tuple(v.type for v in op.results)

    def _following(self, op: Op) -> Op | None:
        """The op on what stands for its operands; None if it must read what was recorded."""
        now = reading(op, lambda value: self.operand(op, value), op.results)
        if op.kind is not Kind.VIEW:
            types = self.types(op, now)
            if types is None or any(t is not v.type and v.storage in self.seen for v, t in zip(op.results, types, strict=True)):
                return None
            pairs = zip(op.results, types, strict=True)
            return replace(now, results=tuple(v if v.type is t else replace(v, type=t) for v, t in pairs))
        # A view that others can see is one of the recorded memory, which they share with it.
        if op.target in BY_PLACE or any(v.storage in self.seen for v in op.results):
            return None
        base, is_view = now.inputs[0], op.results[0].storage == op.inputs[0].storage
        types = view_types(now, is_view)
        if types is None or (not is_view and any(t is not v.type for v, t in zip(op.results, types, strict=True))):
            return None
        if not is_view:
            return now
        pairs = zip(op.results, types, strict=True)
        return replace(now, results=tuple(replace(v, type=t, storage=base.storage, version=base.version) for v, t in pairs))

    def _views_of_copies(self, op: Op) -> None:
        """A view that had to be made of a copy lies in the copy's memory. Raises Stuck if somebody writes it."""
        if op.kind is Kind.VIEW and op.results and op.results[0].storage == op.inputs[0].storage:
            if op.results[0].storage in self.written:
                raise Stuck(f"{op.target} is a view of what is written, and cannot be one in the new layout")
            base = self.recorded(op.inputs[0])
            made = tuple(replace(v, storage=base.storage, version=base.version) for v in op.results)
            self.ops[-1] = replace(self.ops[-1], results=made)
            self.now.update((v.id, new) for v, new in zip(op.results, made, strict=True))
            self.plain.update((new.id, new) for new in made)

    def out_of_date(self, storages: set[int]) -> None:
        """Copies of what lies in these storages may not be read any more."""
        for number in [number for number in self.plain if self.now[number].storage in storages]:
            del self.plain[number]


class Stuck(Exception):
    """Says in a sentence why a layout cannot be changed."""


def reading(op: Op, stands: Callable[[Value], Value], results: tuple[Value, ...]) -> Op:
    """The op on other operands, with other results."""

    def read(argument: Any) -> Any:
        if isinstance(argument, Value):
            return stands(argument)
        return tuple(map(read, argument)) if isinstance(argument, tuple) else argument

    args = read(op.args)
    kwargs = tuple((name, read(a)) for name, a in op.kwargs)
    return replace(op, args=args, kwargs=kwargs, inputs=tuple(values_in((args, tuple(a for _, a in kwargs)))), results=results)


def view_types(op: Op, is_view: bool = True) -> tuple[TensorType, ...] | None:
    """The types that torch gives to the results of a view op.

    None if it cannot be called so, and if it returns a view where it should copy, or the other way round.
    """
    if any(v.type.conj or v.type.neg for v in op.inputs):
        return None
    with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction(), torch.no_grad():
        args = [_as_meta(a) for a in op.args]
        try:
            result = op.target(*args, **{name: _as_meta(a) for name, a in op.kwargs})
        except RuntimeError:
            return None
        results = [result] if isinstance(result, torch.Tensor) else list(result)
        memory = storage_of(args[0])._cdata
        if any((storage_of(t)._cdata == memory) is not is_view for t in results):
            return None
        return tuple(type_of(t, op.inputs[0].type.device) for t in results)


def _as_meta(argument: Any) -> Any:
    if isinstance(argument, Value):
        type_ = argument.type
        reach = type_.offset + 1 + sum((n - 1) * s for n, s in zip(type_.shape, type_.stride, strict=True) if n)
        memory = torch.empty(reach, dtype=type_.dtype, device="meta")
        return torch.as_strided(memory, type_.shape, type_.stride, type_.offset)
    if isinstance(argument, Slot):
        return 1.0
    if isinstance(argument, torch.device):
        return torch.device("meta")
    return [_as_meta(a) for a in argument] if isinstance(argument, tuple) else argument
