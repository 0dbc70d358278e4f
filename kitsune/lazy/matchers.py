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
from kitsune.lazy.call_keys import LONG
from kitsune.lazy.cell import Cell
from kitsune.lazy.edges import Edge, begin_of
from kitsune.lazy.hands_off import DETACHES
from kitsune.lazy.matcher_writer import Unsuited, Writer, serial_of_result
from kitsune.lazy.rebuild import fill
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
    "begin_of": begin_of,
    "count_writes": count_writes,
    "fill": fill,
    "is_grad_enabled": is_grad_enabled,
    "kind_of": kind_of,
    "serial_of_result": serial_of_result,
}


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
        if not (edge.start.depth or edge.dirty) and any(new.wrapped for new in w.fresh):
            # It may be the second question about a result: its answer may be there already.
            raise Unsuited
        if len(w.flat) >= LONG:
            # Its text would take 9 ms to compile: 36 tensors of a fused update.
            raise Unsuited
        for k, begin in edge.begins:
            w.unless(f"begin_of({w.flat[k]}) == {begin}")
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
    then: list[str] = []
    made = [f"w{i}" for i in range(len(edge.made))]
    came = _arrive(w, edge, then)
    undo = "None"
    if edge.dirty:
        cells = [(w.cells[k], after) for k, after in edge.rewrites]
        undo = w.name("[" + ", ".join(f"({cell}, {came.get(cell, f'{cell}.ref')})" for cell, _ in cells) + "]")
        dirty = w.name(f"region.dirty | {w.bind(edge.dirty)}")
        then += [f"{cell}.ref = {w.bind(after)}" for cell, after in cells] + [f"region.dirty = {dirty}"]
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
        debt = w.name(f"({name}, args, kwargs, {_tuple(w.flat)}, {_tuple(made)}, {undo}, region.dirty, recorder.epoch)")
        then += [f"region.past.append({name})", f"region.calls.append({debt})"]
    if edge.moves:
        then.append(f"region.scalars.extend({_tuple(w.floats)})")
    elif edge.scalars:
        then.append(f"region.scalars.extend({w.bind(edge.scalars)})")
    if edge.bumps:
        then.append(f"count_writes(region, [{', '.join(w.flat[k] for k in edge.bumps)}], {w.bind(edge)})")
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


def _arrive(w: Writer, edge: Edge, then: list[str]) -> dict[str, str]:
    """Let the fresh tensors in; returns what their cells stand for then, whatever they stood for in the region before."""
    came = {}
    for k, number, type_, storage, graded in edge.arrivals:
        new, value, memory = w.fresh[k], w.bind(number), w.bind(storage)
        a, cell = new.tensor, new.cell
        came[cell] = value
        then.append(f"storages[{new.serial}] = {memory}")
        if new.wrapped:
            then.append(f"region.inputs.append(({number.id}, {cell}.real)); {cell}.region = region; {cell}.ref = {value}")
            then.append(f"{cell}.storage = {memory}; {cell}.external = True; {cell}.came = {value}")
            continue
        # The one that it had in the region before, which lets go of it at its end.
        spare = w.bind(Cell(None, number, type_, storage, None, number))
        like = f"None, {value}, {w.bind(type_)}, {memory}, None, {value}"
        w.lines.append(f"{cell} = {spare} if {spare}.region is None else Cell({like})")
        if graded:
            w.lines.append(f"if id({a}) not in recorder.leaves: recorder.note_leaf({a})")
        then.append(f"{cell}.region = region; {cell}.real = {a}; {cell}.ref = {value}; plain[id({a})] = {cell}")
    return came


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
