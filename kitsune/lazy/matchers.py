"""A matcher takes one call that is known at its place: Python made for it alone, which compares what comes with what is expected.

Building a key that fits any call, looking it up and stepping on cost 9 us a call; a matcher does it in 3, of which 1 is the
wrapper. What a matcher does not know it leaves to the way of all calls.
"""

import functools
import math
from typing import Any

from torch import Tensor, is_grad_enabled
from torch.nn import Parameter

from kitsune.ir.graph import Operand, Result
from kitsune.lazy.call_keys import AGAIN, LONG
from kitsune.lazy.cell import Cell, Ref, ref
from kitsune.lazy.edges import Edge
from kitsune.lazy.hands_off import DETACHES
from kitsune.lazy.rebuild import fill
from kitsune.lazy.recorder import CONSTANTS
from kitsune.lazy.scalar_sources import kind_of
from kitsune.lazy.tensor import LazyTensor
from kitsune.lazy.write_counts import count_writes

# What a matcher returns of a call that is another one.
MISS = object()
_ALWAYS = {
    "Cell": Cell,
    "LazyTensor": LazyTensor,
    "MISS": MISS,
    "Parameter": Parameter,
    "Tensor": Tensor,
    "count_writes": count_writes,
    "fill": fill,
    "is_grad_enabled": is_grad_enabled,
    "kind_of": kind_of,
}


class Unsuited(Exception):
    """No matcher is made for this call."""


class Writer:
    """Writes a matcher's text. The text depends on the form of the call alone, so that equal layers share its compilation."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.constants: dict[str, Any] = {}
        # The names of the call's tensors, of their cells, of its floats; what is known of the fresh ones, and their names.
        self.flat: list[str] = []
        self.cells: list[str] = []
        self.floats: list[str] = []
        self.fresh: dict[str, str] = {}
        self._n = 0

    def bind(self, value: Any) -> str:
        """A name for a constant."""
        name = f"K{len(self.constants)}"
        self.constants[name] = value
        return name

    def name(self, expression: str) -> str:
        """A local name for what an expression gives."""
        self._n += 1
        self.lines.append(f"a{self._n} = {expression}")
        return f"a{self._n}"

    def unless(self, condition: str) -> None:
        """Another call, unless this holds."""
        self.lines.append(f"if not ({condition}): return MISS")

    def part(self, a: str, value: Any, key: Any) -> None:
        """Compare the argument named `a` with one whose part of the key is `key`."""
        cls = type(value)
        if cls is LazyTensor:
            self._wrapper(a, key)
        elif cls is Tensor or cls is Parameter:
            self.unless(f"type({a}) is {'Tensor' if cls is Tensor else 'Parameter'}")
            self._plain(a, key)
        elif value is None or cls is bool or value is Ellipsis:
            self.unless(f"{a} is {value}")
        elif cls is float:
            self.unless(f"type({a}) is float")
            self.floats.append(a)
        elif cls in CONSTANTS:
            self.unless(f"type({a}) is {self.bind(cls)} and {a} == {self.bind(value)}")
        elif cls is slice:
            self.unless(f"type({a}) is {self.bind(cls)}")
            for name, part in zip(("start", "stop", "step"), key[1:], strict=True):
                self.part(self.name(f"{a}.{name}"), getattr(value, name), part)
        elif isinstance(value, (tuple, list)) and isinstance(key, tuple) and len(value) < LONG:
            self.unless(f"type({a}) is {self.bind(cls)} and len({a}) == {len(value)}")
            for k, (item, part) in enumerate(zip(value, key[1:], strict=True)):
                self.part(self.name(f"{a}[{k}]"), item, part)
        else:
            raise Unsuited

    def _wrapper(self, a: str, key: Any) -> None:
        value, graded = _value_in(key)
        self.unless(f"type({a}) is LazyTensor")
        cell = self.name(f"{a}.cell")
        owes = "is not None" if graded else "is None"
        self.unless(f"{cell}.ref is {self.bind(value)} and {cell}.region is region and {cell}.owed {owes}")
        self.flat.append(a)
        self.cells.append(cell)

    def _plain(self, a: str, key: Any) -> None:
        self.flat.append(a)
        number = self.name(f"id({a})")
        if isinstance(key, Ref) or key[0] == "graded":
            value, graded = _value_in(key)
            cell = self.name(f"plain.get({number})")
            self.unless(f"{cell} is not None and {cell}.ref is {self.bind(value)} and {a}.requires_grad is {graded}")
            self.cells.append(cell)
            return
        if key[0] is AGAIN or key[1] is not None:
            raise Unsuited
        seen = self.name(f"arrivals.get({number})")
        self.unless(f"{seen} is not None and {seen}[2] is {self.bind(key)} and {seen}[1] not in storages")
        for other in self.fresh:
            self.unless(f"{seen}[1] != {other}[1]")
        self.fresh[seen] = a
        self.cells.append(f"{a}_cell")


def _value_in(key: Any) -> tuple[Ref, bool]:
    """The value that a part of a key names, and has it a place in the autograd graph."""
    if isinstance(key, Ref):
        return key, False
    if isinstance(key, tuple) and key and key[0] == "graded":
        return ref(key[1]), True
    raise Unsuited


def matcher_for(edge: Edge, key: Any, args: Any, kwargs: Any, moves: dict[Any, bool] | None) -> Any:
    """The matcher of an edge, of which a call with this key is an example; None where there can be none.

    `moves` is given where its floats may be any, as long as it holds True for the function.
    """
    w = Writer()
    try:
        # Calls in C only: one of torch's functions in Python would come here again and again.
        if edge.node.full or (edge.plain and edge.func not in DETACHES):
            raise Unsuited
        n = len(args)
        w.unless(f"len(args) == {n} and " + (f"kwargs and len(kwargs) == {len(kwargs)}" if kwargs else "not kwargs"))
        for k, (a, part) in enumerate(zip(args, key[2 : 2 + n], strict=True)):
            w.part(w.name(f"args[{k}]"), a, part)
        for (name, a), part in zip(kwargs.items(), key[3 + n :: 2], strict=True):
            w.part(w.name(f"kwargs.get({name!r}, MISS)"), a, part)
        if len(w.flat) >= LONG:
            # Its text would take 9 ms to compile: 36 tensors of a fused update.
            raise Unsuited
        _same_floats(w, edge, moves, (edge.func, *kwargs))
        _only_under(w, edge)
        if edge.plain:
            w.lines.append(f"return lane.made({w.bind(edge.func)}, args, kwargs)")
        else:
            _follow(w, edge)
    except Unsuited:
        return None
    return _maker("\n        ".join(w.lines), tuple(w.constants))(*w.constants.values())


def either(one: Any, other: Any) -> Any:
    """Two matchers as one. Of more than these two the elder is forgotten."""

    def matcher(lane: Any, region: Any, node: Any, args: Any, kwargs: Any) -> Any:
        result = one(lane, region, node, args, kwargs)
        return other(lane, region, node, args, kwargs) if result is MISS else result

    other = getattr(other, "one", other)
    matcher.one = one  # type: ignore[attr-defined]
    return matcher


def _same_floats(w: Writer, edge: Edge, moves: Any, name: Any) -> None:
    if w.floats and moves is not None:
        w.unless(f"{w.bind(moves)}.get({w.bind(name)})")
        for a, known in zip(w.floats, edge.floats, strict=True):
            w.unless(f"kind_of({a}) == {w.bind(kind_of(known))}")
        return
    for a, known in zip(w.floats, edge.floats, strict=True):
        # 0.0 == -0.0, and not a number equals nothing.
        ordinary = known and math.isfinite(known)
        w.unless(f"{a} == {w.bind(known)}" if ordinary else f"{a}.hex() == {w.bind(known.hex())}")


def _only_under(w: Writer, edge: Edge) -> None:
    w.lines.insert(0, f"if region.slow or region.real or lane.modes[is_grad_enabled()] is not {w.bind(edge.modes)}: return MISS")


def _follow(w: Writer, edge: Edge) -> None:
    """What follows once the call is known. All that is new is made first: who makes objects may have others finalized, and
    their finalizers may end the region."""
    flat, fresh, then = w.flat, list(w.fresh.items()), []
    made = [f"w{i}" for i in range(len(edge.made))]
    for k, number, type_, storage, graded in edge.arrivals:
        seen, a = fresh[k]
        value = w.bind(number)
        # The one that it had in the region before, which lets go of it at its end.
        like = f"None, {value}, {w.bind(type_)}, {w.bind(storage)}, None, {value}"
        cell = w.bind(Cell(None, number, type_, storage, None, number))
        w.lines.append(f"{a}_cell = {cell} if {cell}.region is None else Cell({like})")
        if graded:
            w.lines.append(f"if id({a}) not in recorder.leaves: recorder.note_leaf({a})")
        then.append(f"{a}_cell.region = region; {a}_cell.real = {a}; {a}_cell.ref = {value}")
        then += [f"storages[{seen}[1]] = {a}_cell.storage", f"plain[id({a})] = {a}_cell"]
    if edge.dirty:
        then += [f"{w.cells[k]}.ref = {w.bind(after)}" for k, after in edge.rewrites]
        then.append(f"region.dirty |= {w.bind(edge.dirty)}")
    for i, m in enumerate(edge.made):
        new = (
            f"w{i} = {w.bind(m.make)}(); w{i}.cell = c{i} = Cell(region, {w.bind(m.ref)}, {w.bind(m.type)}, {w.bind(m.storage)})"
        )
        if m.graded is None:
            w.lines.append(new)
        else:
            spare = w.bind(m.spare)
            w.lines.append(f"if {spare}: w{i} = {spare}.pop(); c{i} = w{i}.cell; c{i}.region = region")
            w.lines.append(f"else: {new}; c{i}.owed = c{i}.home = {w.bind(m)}")
        then.append(f"region.produced.append(c{i})")
    then.append(f"region.node = {w.bind(edge.node)}")
    if edge.graded:
        name = w.bind(edge)
        debt = w.name(f"({name}, args, kwargs, {_tuple(flat)}, {_tuple(made)}, recorder.epoch)")
        then += [f"region.past.append({name})", f"region.calls.append({debt})"]
    if edge.moves:
        then.append(f"region.scalars.extend({_tuple(w.floats)})")
    elif edge.scalars:
        then.append(f"region.scalars.extend({w.bind(edge.scalars)})")
    if edge.bumps:
        then.append(f"count_writes(region, [{', '.join(flat[k] for k in edge.bumps)}], {w.bind(edge)})")
    then += ["recorder.tally.followed += 1", f"return {_returned(w, edge.structure, made)}"]
    w.lines += [
        "shared = recorder.shared",
        "if shared: recorder.lock.acquire()",
        "try:",
        "    if recorder.region is not region or region.node is not node: return MISS",
        *("    " + line for line in then),
        "finally:",
        "    if shared: recorder.lock.release()",
    ]


def _returned(w: Writer, structure: Any, made: list[str]) -> str:
    if isinstance(structure, Result):
        return made[structure.index]
    if isinstance(structure, Operand):
        return w.flat[structure.index]
    if structure is None:
        return "None"
    return f"fill({w.bind(structure)}, {_tuple(made)}, {_tuple(w.flat)})"


def _tuple(names: list[str]) -> str:
    return f"({', '.join(names)},)" if names else "()"


@functools.lru_cache(maxsize=4096)
def _maker(body: str, names: tuple[str, ...]) -> Any:
    text = f"""
def make({", ".join(names)}):
    def matcher(lane, region, node, args, kwargs{"".join(f", {name}={name}" for name in names)}):
        recorder, plain, storages = lane.recorder, region.plain, region.storages
        arrivals = recorder.arrivals
        {body}
    return matcher
"""
    names_in: dict[str, Any] = dict(_ALWAYS)
    exec(compile(text, "<kitsune matcher>", "exec"), names_in)
    return names_in["make"]
