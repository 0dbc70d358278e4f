"""Writes the Python that takes a call which is known at its place; see `matchers.py` and `module_calls.py`."""

import functools
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from kitsune.ir.graph import Operand, Result
from kitsune.lazy.call_keys import AGAIN, LONG
from kitsune.lazy.cell import Cell, Ref, ref
from kitsune.lazy.edges import Edge
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
    "Module": Module,
    "Parameter": Parameter,
    "Tensor": Tensor,
    "count_writes": count_writes,
    "increment": torch._C._increment_version,
    "fill": fill,
    "is_": is_,
    "is_grad_enabled": torch.is_grad_enabled,
    "kind_of": kind_of,
    "tracing": torch._C._get_tracing_state,  # type: ignore[attr-defined]
}


class Unsuited(Exception):
    """No matcher is made for this call."""


class Writer:
    """Writes a matcher's text. The text depends on the form of the call alone, so that equal layers share its compilation."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.constants: dict[str, Any] = {}
        self._n = self._n_calls = 0
        # Storages that the calls before this one write, and the region has not written before.
        self.n_dirty = 0
        self.begin()

    def begin(self) -> None:
        """What comes next is about another call."""
        self._n_calls += 1
        # The names of the call's tensors, of their cells, of its floats.
        self.flat: list[str] = []
        self.cells: list[str] = []
        self.floats: list[str] = []
        # Of each fresh tensor: its name, what tells the serial of its storage, and what its id.
        self.fresh: list[tuple[str, str, str]] = []

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
            self.plain(a, value, key)
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
        value, graded = value_in(key)
        self.unless(f"type({a}) is LazyTensor")
        cell = self.name(f"{a}.cell")
        owes = "is not None" if graded else "is None"
        self.unless(f"{cell}.ref is {self.bind(value)} and {cell}.region is region and {cell}.owed {owes}")
        self.flat.append(a)
        self.cells.append(cell)

    def plain(self, a: str, value: Any, key: Any) -> None:
        """Compare a plain tensor."""
        self.flat.append(a)
        number = self.name(f"id({a})")
        if isinstance(key, Ref) or key[0] == "graded":
            known, graded = value_in(key)
            cell = self.name(f"plain.get({number})")
            self.unless(f"{cell} is not None and {cell}.ref is {self.bind(known)} and {a}.requires_grad is {graded}")
            self.cells.append(cell)
            return
        if key[0] is AGAIN or key[1] is not None:
            raise Unsuited
        seen = self.name(f"arrivals.get({number})")
        self.unless(f"{seen} is not None and {seen}[2] is {self.bind(key)} and {seen}[1] not in storages")
        for _, serial, _ in self.fresh:
            self.unless(f"{seen}[1] != {serial}")
        self.comes(a, f"{seen}[1]", number)

    def new_names(self, n: int) -> list[str]:
        """Names for what a call makes."""
        return [f"w{self._n_calls}_{k}" for k in range(n)]

    def compiled(self, head: str) -> Any:
        """The function of these arguments that consists of the lines."""
        return _maker(head, "\n        ".join(self.lines), tuple(self.constants))(*self.constants.values())

    def comes(self, a: str, serial: str, number: str) -> None:
        """A tensor is new to the region."""
        self.fresh.append((a, serial, number))
        self.cells.append(f"{a}_cell")


def value_in(key: Any) -> tuple[Ref, bool]:
    """The value that a part of a key names, and has it a place in the autograd graph."""
    if isinstance(key, Ref):
        return key, False
    if isinstance(key, tuple) and key and key[0] == "graded":
        return ref(key[1]), True
    raise Unsuited


def only_under(w: Writer, edge: Edge) -> None:
    """Another call, unless it is made under the modes of this one, in a region that can be followed."""
    w.lines.insert(0, f"if region.slow or region.real or lane.modes[is_grad_enabled()] is not {w.bind(edge.modes)}: return MISS")


def followed(w: Writer, edge: Edge, args: str, kwargs: str) -> tuple[list[str], str]:
    """What follows once the call is known, and its result. All that is new is made first: who makes objects may have others
    finalized, and their finalizers may end the region."""
    flat, then = w.flat, []
    made = w.new_names(len(edge.made))
    for k, number, type_, storage, graded in edge.arrivals:
        a, serial, own = w.fresh[k]
        value = w.bind(number)
        # The one that it had in the region before, which lets go of it at its end.
        like = f"None, {value}, {w.bind(type_)}, {w.bind(storage)}, None, {value}"
        cell = w.bind(Cell(None, number, type_, storage, None, number))
        w.lines.append(f"{a}_cell = {cell} if {cell}.region is None else Cell({like})")
        w.lines.append(f"{a}_cell.ref = {value}")
        if graded:
            w.lines.append(f"if {own} not in recorder.leaves: recorder.note_leaf({a})")
        then.append(f"{a}_cell.region = region; {a}_cell.real = {a}")
        then += [f"storages[{serial}] = {w.bind(storage)}", f"plain[{own}] = {a}_cell"]
    undo = "None"
    if edge.dirty:
        cells = [(w.cells[k], after) for k, after in edge.rewrites]
        undo = w.name("[" + ", ".join(f"({cell}, {cell}.ref)" for cell, _ in cells) + "]")
        then += [f"{cell}.ref = {w.bind(after)}" for cell, after in cells]
        written = list(edge.dirty)
        alone = len(written) == 1
        then.append(f"region.dirty[{w.bind(written[0])}] = None" if alone else f"region.dirty.update({w.bind(edge.dirty)})")
    for a, m in zip(made, edge.made, strict=True):
        cell = f"Cell(region, {w.bind(m.ref)}, {w.bind(m.type)}, {w.bind(m.storage)})"
        new = f"{a} = {w.bind(m.make)}(); {a}.cell = {a}_cell = {cell}"
        if m.graded is None:
            w.lines.append(new)
        else:
            spare = w.bind(m.spare)
            w.lines.append(f"if {spare}: {a} = {spare}.pop(); {a}_cell = {a}.cell; {a}_cell.region = region")
            w.lines.append(f"else: {new}; {a}_cell.owed = {a}_cell.home = {w.bind(m)}")
        then.append(f"region.produced.append({a}_cell)")
    then.append(f"region.node = {w.bind(edge.node)}")
    if edge.graded:
        name = w.bind(edge)
        n_dirty = f"len(region.dirty) + {w.n_dirty}" if w.n_dirty else "len(region.dirty)"
        debt = w.name(f"({name}, {args}, {kwargs}, {tuple_of(flat)}, {tuple_of(made)}, {undo}, {n_dirty}, recorder.epoch)")
        then += [f"region.past.append({name})", f"region.calls.append({debt})"]
    if edge.moves:
        then.append(f"region.scalars.extend({tuple_of(w.floats)})")
    elif edge.scalars:
        then.append(f"region.scalars.extend({w.bind(edge.scalars)})")
    if edge.bumps:
        then += _count(w, edge)
    then.append("recorder.tally.followed += 1")
    return then, _returned(w, edge.structure, made)


def _count(w: Writer, edge: Edge) -> list[str]:
    """What counts the writes of a call."""
    tensors = ", ".join(w.flat[k] for k in edge.bumps)
    if len(edge.bumps) != 1:
        return [f"count_writes(region, [{tensors}], {w.bind(edge)})"]
    # As `count_writes` does it, which takes 0.8 us; a ResNet-50 has 119 of these.
    k = edge.bumps[0]
    owed = f" and not ({w.cells[k]}.owed is not None and not {w.cells[k]}.spent)" if edge.graded else ""
    return [f"increment(({tensors},))", f"if region.calls{owed}: region.counted.append((len(region.calls), [{tensors}]))"]


def under_lock(w: Writer, then: list[str]) -> None:
    """Step along: what is to be done then. Another thread may have ended the region meanwhile."""
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
    return f"fill({w.bind(structure)}, {tuple_of(made)}, {tuple_of(w.flat)})"


def tuple_of(names: list[str]) -> str:
    return f"({', '.join(names)},)" if names else "()"


@functools.lru_cache(maxsize=4096)
def _maker(head: str, body: str, names: tuple[str, ...]) -> Any:
    text = f"""
def make({", ".join(names)}):
    def taker({head}{"".join(f", {name}={name}" for name in names)}):
        recorder, plain, storages = lane.recorder, region.plain, region.storages
        arrivals = recorder.arrivals
        {body}
    return taker
"""
    names_in: dict[str, Any] = dict(_ALWAYS)
    exec(compile(text, "<kitsune matcher>", "exec"), names_in)
    return names_in["make"]
