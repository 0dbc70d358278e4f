"""Calls that give what an earlier call gave are not made again."""

from dataclasses import dataclass, field, replace
from typing import Any

from kitsune.ir import Graph, Kind, Op, Slot, Value, roots

# Kinds of which two equal calls give equal bits: for the rest a library may choose another algorithm the second time.
REPEATABLE = {Kind.POINTWISE, Kind.REDUCTION, Kind.GEMM}


def common_subexpressions(graph: Graph) -> Graph:
    """Without calls that give what an earlier call gave: the same op on the same contents.

    A result that lives on after the region, or that is written to, keeps its own memory.
    """
    known = _Known(roots(graph))
    written = {s for op in graph.ops for s in op.effects.writes} | {v.storage for v in graph.inputs}
    alive = written | {v.storage for v in graph.outputs}
    ops = []
    for recorded in graph.ops:
        op = known.substitute(recorded)
        for value in op.outputs:
            known.versions[value.storage] = max(known.versions.get(value.storage, 0), value.version)
        key = None if op.kind not in REPEATABLE or op.effects.writes or op.effects.random or not op.results else known.key_of(op)
        first = None if key is None else known.calls.get(key)
        own = {v.storage for v in op.results}
        if first is not None and not own & alive:
            known.move(op, first)
            continue
        if key is not None and not own & written:
            known.calls.setdefault(key, op)
        ops.append(op)
    return Graph(graph.inputs, tuple(ops), graph.outputs) if known.moved else graph


@dataclass(slots=True)
class _Known:
    """The calls seen, and the values that stand for others' now."""

    root_of: dict[int, Value]
    calls: dict[Any, Op] = field(default_factory=dict)
    moved: dict[int, Value] = field(default_factory=dict)
    storages: dict[int, int] = field(default_factory=dict)
    versions: dict[int, int] = field(default_factory=dict)

    def key_of(self, op: Op) -> Any:
        """Equal for calls that give the same."""
        return (op.target, self._word(op.args), self._word(op.kwargs), op.grad_enabled)

    def move(self, op: Op, first: Op) -> None:
        """Let the results of an earlier call stand for those of this one."""
        for value, known in zip(op.results, first.results, strict=True):
            self.moved[value.id] = known
            self.storages[value.storage] = known.storage
            self.root_of[value.id] = self.root_of[known.id]

    def substitute(self, op: Op) -> Op:
        """The op, reading what its operands were moved to; a view of such an operand moves to the other storage with it."""
        if not self.moved or not any(v.id in self.moved for v in op.inputs):
            return op
        results = []
        for value in op.results:
            if value.storage in self.storages:
                root = self.root_of[value.id]
                value = self.moved[value.id] = replace(value, storage=self.storages[value.storage])
                self.root_of[value.id] = self.root_of[root.id] if root.id != value.id else value
            results.append(value)
        return replace(
            op,
            args=self._read(op.args),
            kwargs=self._read(op.kwargs),
            inputs=tuple(self.moved.get(v.id, v) for v in op.inputs),
            results=tuple(results),
        )

    def _read(self, argument: Any) -> Any:
        if isinstance(argument, Value):
            return self.moved.get(argument.id, argument)
        if isinstance(argument, tuple):
            return tuple(self._read(a) for a in argument)
        return argument

    def _word(self, argument: Any) -> Any:
        """A hashable word for an argument: tensors by contents and geometry, numbers by type and value."""
        if isinstance(argument, Value):
            return ("value", id(self.root_of[argument.id]), argument.type, self.versions.get(argument.storage, 0))
        if isinstance(argument, (tuple, list)):
            return tuple(self._word(a) for a in argument)
        if isinstance(argument, Slot):
            return ("slot", argument.index)
        if isinstance(argument, float):
            return ("float", argument.hex())
        if isinstance(argument, complex):
            return ("complex", argument.real.hex(), argument.imag.hex())
        return (type(argument), argument)
