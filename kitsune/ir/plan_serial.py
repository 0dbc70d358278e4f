"""Plans as bytes and back, for a graph that is equal to the one they were made for: its ops give theirs the lines of today."""

import copyreg
import hashlib
import io
import marshal
import pickle
from collections.abc import Callable, Hashable
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any

import torch
from torch._ops import OpOverload

from kitsune.ir import barrier, graph as nouns, plan as plans, program as programs
from kitsune.ir.graph import Effects, Graph, Op, Operand, Result, Slot, Value
from kitsune.ir.plan import Launch, Load, Local, Plan
from kitsune.ir.serial import SPELL, overload
from kitsune.ir.tensor_type import TensorType, tensor_type

# What a plan consists of. A file names what is called to read it, and these do nothing but hold their arguments.
_READABLE: set[Any] = {
    cls
    for module in (nouns, plans, programs, barrier)
    for cls in vars(module).values()
    if isinstance(cls, type) and cls.__module__ == module.__name__
} | {torch.Size, torch.device, complex, torch.serialization._get_layout}
_CONSTANTS = (torch.dtype, torch.memory_format)
# Those of which one serves for all that are equal: whatever they hold is of one type. (To Python 1, 1.0 and True are equal.)
_SHARED = frozenset({Effects, Result, Operand, Slot, Load, Local})
_INT = frozenset({int})


def graph_digest(graph: Graph) -> bytes:
    """Equal for graphs that a planner cannot tell apart. Raises TypeError for one with constants that nobody can spell."""
    types: dict[TensorType, int] = {}

    def of_value(v: Value) -> tuple[int, ...]:
        return v.id, types.setdefault(v.type, len(types)), v.storage, v.version

    def of_op(op: Op) -> tuple[Any, ...]:
        return (
            _called_in_full(op.target),
            op.kind.name,
            _plain(op.args),
            tuple([(name, _plain(a)) for name, a in op.kwargs]),
            tuple([v.id for v in op.inputs]),
            _plain(op.structure),
            tuple(map(of_value, op.results)),
            tuple([(before.id, of_value(after)) for before, after in op.rewritten]),
            (op.effects.writes, op.effects.random, op.grad_enabled, op.allocates, op.late, op.derived),
        )

    values, ops = tuple(map(of_value, graph.inputs)), tuple(map(of_op, graph.ops))
    shown = tuple((str(t.dtype), tuple(t.shape), t.stride, t.offset, str(t.device), t.conj, t.neg) for t in types)
    # A format without references between equal objects: what is written depends on nothing but values and their types.
    return hashlib.sha256(marshal.dumps((values, ops, [v.id for v in graph.outputs], graph.awaited, shown), 2)).digest()


_called_in_full = cache(lambda target: str(target.name()))
_ATOMS = frozenset({int, str, bool, float, type(None)})
# Bytes, which no operator takes, tell what stands for something else.
_TAGS = {Slot: b"%", Result: b"result", Operand: b"operand"}


def _plain(a: Any) -> Any:
    """An argument as what every process writes alike."""
    cls = type(a)
    if cls is Value:
        return b"$", a.id
    if cls in _ATOMS:
        return a
    if cls is tuple or cls is torch.Size:
        return tuple(map(_plain, a))
    if cls is list:
        return list(map(_plain, a))
    if cls in _TAGS:
        return _TAGS[cls], a.index
    if cls in SPELL:
        return SPELL[cls][0].encode(), str(a)
    raise TypeError(f"{cls.__name__} {a!r} cannot be spelled")


def dump_plan(plan: Plan, graph: Graph) -> bytes:
    """What `load_plan` reads; the plan was made for the graph."""
    buffer = io.BytesIO()
    _Writer(buffer, graph).dump(plan)
    return buffer.getvalue()


def load_plan(content: bytes, graph: Graph) -> Plan:
    """The plan again, for a graph equal to the one it was made for, with that one's lines.

    Raises pickle.UnpicklingError, and other things for content that `dump_plan` has not written.
    """
    plan, give_lines = load_plan_ahead(content)
    give_lines(graph)
    return plan


def load_plan_ahead(content: bytes) -> tuple[Plan, Callable[[Graph], None]]:
    """The same before there is such a graph, and what gives the plan's ops its lines once there is."""
    reader = _Reader(io.BytesIO(content))
    plan = reader.load()
    if not isinstance(plan, Plan):
        raise pickle.UnpicklingError(f"a {type(plan).__name__} is no plan")
    return plan, reader.give_lines


class _Writer(pickle.Pickler):
    """Names lines by the op of the graph that has them, what is interned by what it consists of, and of small parts that are
    equal only one: a plan that is read has a third fewer objects."""

    def __init__(self, buffer: io.BytesIO, graph: Graph) -> None:
        super().__init__(buffer, pickle.HIGHEST_PROTOCOL)
        places = {id(op): i for i, op in enumerate(graph.ops)}
        sites = {op.site: i for i, op in enumerate(graph.ops) if op.site is not None}
        seen: dict[Any, Any] = {}

        def shared(part: Any) -> Any:
            cls = type(part)
            if cls is tuple:
                types = {*map(type, part)}
                if types <= _INT:
                    return seen.setdefault(part, part)
                return tuple(map(shared, part)) if types <= _SHARED else part
            return seen.setdefault(part, part) if cls in _SHARED else part

        def called(noun: Any) -> Any:
            # Made again by its class: dataclasses' own way takes three times as long to read.
            return type(noun), tuple([shared(getattr(noun, name)) for name in _names(noun.__class__)])

        def of_op(op: Op) -> Any:
            # An op of the planner's has the line of the one that it stands for.
            place = places.get(id(op), sites.get(op.site) if op.site is not None else None)
            return _op, (place, *[None if name == "site" else shared(getattr(op, name)) for name in _names(Op)])

        table: dict[Any, Callable[[Any], Any]] = {cls: called for cls in _READABLE if is_dataclass(cls)}
        table[Op] = of_op
        table[Launch] = lambda launch: (_launch, called(launch)[1])
        table[OpOverload] = lambda target: (overload, (str(target.name()),))
        table[TensorType] = lambda t: (tensor_type, (t.dtype, t.shape, t.stride, t.offset, t.device, t.conj, t.neg))
        self.dispatch_table = {**copyreg.dispatch_table, **table}


class _Reader(pickle.Unpickler):
    def __init__(self, buffer: io.BytesIO) -> None:
        super().__init__(buffer)
        placed: list[tuple[Op, int]] = []

        def op(place: int | None, *fields: Any) -> Op:
            made = Op(*fields)
            if place is not None:
                placed.append((made, place))
            return made

        self._placed = placed

        self._here = {"_op": op, "_launch": _launch, "overload": overload, "tensor_type": tensor_type}

    def give_lines(self, graph: Graph) -> None:
        """The lines of the ops of a graph."""
        for op, place in self._placed:
            op.site = graph.ops[place].site

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("kitsune.ir.") and name in self._here:
            return self._here[name]
        found = super().find_class(module, name)
        if not isinstance(found, _CONSTANTS) and found not in _READABLE:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of a plan")
        return found


@cache
def _names(cls: Hashable) -> tuple[str, ...]:
    return tuple(field.name for field in fields(cls) if field.init)  # type: ignore[arg-type]


def _op(place: int | None, *fields: Any) -> Op:
    raise NotImplementedError  # its name stands in the file; who reads it has the lines


def _launch(*fields: Any) -> Launch:
    """Of this file, so that the thread that works in the background may rest here: half of the time goes into launches."""
    return Launch(*fields)
