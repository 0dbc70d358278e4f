"""Writes what a matcher does once it knows its call, and makes what was written a function."""

import functools
from collections.abc import Iterator
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from kitsune.ir.graph import Operand, Result
from kitsune.lazy.call_keys import arrival
from kitsune.lazy.cell import Cell
from kitsune.lazy.edges import Edge, Made, begin_of
from kitsune.lazy.matcher_writer import Unsuited, Writer, serial_of_result
from kitsune.lazy.rebuild import fill
from kitsune.lazy.scalar_sources import kind_of
from kitsune.lazy.spent_views import written_views
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
    "arrival": arrival,
    "begin_of": begin_of,
    "count_writes": count_writes,
    "increment": torch._C._increment_version,
    "fill": fill,
    "is_": is_,
    "is_grad_enabled": torch.is_grad_enabled,
    "kind_of": kind_of,
    "serial_of_result": serial_of_result,
    "tracing": torch._C._get_tracing_state,  # type: ignore[attr-defined]
}


def only_under(w: Writer, edge: Edge) -> None:
    """Another call, unless it is made under the modes of this one, in a region that can be followed."""
    w.lines.insert(0, f"if region.slow or region.real or lane.modes[is_grad_enabled()] is not {w.bind(edge.modes)}: return MISS")


def followed(w: Writer, edge: Edge, args: str, kwargs: str) -> tuple[list[str], str]:
    """What follows once the call is known, and its result. All that is new is made first: who makes objects may have others
    finalized, and their finalizers may end the region. Writes are counted at the very end, which makes objects, too."""
    then: list[str] = []
    for k, begin in edge.begins:
        w.unless(f"begin_of({w.flat[k]}) == {begin}")
    for k in written_views(edge):
        w.unless(f"not {w.cells[k]}.spent")
    made = [a if m.turned is None else w.flat[m.turned] for a, m in zip(w.new_names(len(edge.made)), edge.made, strict=True)]
    _arrive(w, edge, then)
    if edge.dirty:
        then += [f"{w.cells[k]}.ref = {w.bind(after)}" for k, after in edge.rewrites]
        written = list(edge.dirty)
        alone = len(written) == 1
        then.append(f"region.dirty.add({w.bind(written[0])})" if alone else f"region.dirty.update({w.bind(edge.dirty)})")
    for a, m in zip(made, edge.made, strict=True):
        if m.turned is None:
            _make(w, a, m)
            then.append(f"region.produced.append({a}_cell)")
        else:
            then.append(f"{w.cells[m.turned]}.owed = {w.bind(m)}")
    then.append(f"region.node = {w.bind(edge.node)}")
    if edge.graded:
        name = w.bind(edge)
        debt = w.name(f"({name}, {args}, {kwargs}, {tuple_of(w.flat)}, {tuple_of(made)}, recorder.epoch)")
        then += [f"region.past.append({name})", f"region.calls.append({debt})"]
        w.n_debts += 1
    then += [f"recorder.outlived.nodes.extend({w.bind(edge.casts)})"] * bool(edge.casts)
    if edge.moves:
        numbers = w.name(tuple_of(w.floats))
        then.append(f"region.scalars.extend({numbers})")
    elif edge.scalars:
        then.append(f"region.scalars.extend({w.bind(edge.scalars)})")
    if edge.bumps:
        w.counts.append((edge, w.n_debts, [w.flat[k] for k in edge.bumps], w.cells[edge.bumps[0]]))
    then.append("recorder.tally.followed += 1")
    return then, _returned(w, edge.structure, made)


def _make(w: Writer, a: str, made: Made) -> None:
    """Make what a call returns."""
    cell = f"Cell(region, {w.bind(made.ref)}, {w.bind(made.type)}, {w.bind(made.storage)})"
    new = f"{a} = {w.bind(made.make)}(); {a}.cell = {a}_cell = {cell}"
    if made.graded is None:
        w.lines.append(new)
        return
    spare = w.bind(made.spare)
    w.lines.append(f"if {spare}: {a} = {spare}.pop(); {a}_cell = {a}.cell; {a}_cell.region = region")
    w.lines.append(f"else: {new}; {a}_cell.owed = {a}_cell.home = {w.bind(made)}")


def _arrive(w: Writer, edge: Edge, then: list[str]) -> None:
    """Let the fresh tensors in."""
    if edge.derived:
        raise Unsuited
    for k, number, type_, storage, graded in edge.arrivals:
        new, value, memory = w.fresh[k], w.bind(number), w.bind(storage)
        a, cell = new.tensor, new.cell
        then.append(f"storages[{new.serial}] = {memory}")
        if new.number is None:
            brought = w.name(f"({number.id}, {cell}.real)")
            then.append(f"region.inputs.append({brought}); {cell}.region = region; {cell}.ref = {value}")
            then.append(f"{cell}.storage = {memory}; {cell}.external = True; {cell}.came = {value}")
            continue
        # The one that it had in the region before, which lets go of it at its end.
        spare = w.bind(Cell(None, number, type_, storage, None, number))
        like = f"None, {value}, {w.bind(type_)}, {memory}, None, {value}"
        w.lines.append(f"{cell} = {spare} if {spare}.region is None else Cell({like})")
        if graded:
            w.lines.append(f"if {new.number} not in recorder.leaves: recorder.leaves.note({a})")
        then.append(f"{cell}.region = region; {cell}.real = {a}; {cell}.ref = {value}; plain[{new.number}] = {cell}")


def _count(w: Writer) -> Iterator[str]:
    """What counts the writes of the calls."""
    for edge, n_debts, tensors, cell in w.counts:
        later, written = w.n_debts - n_debts, ", ".join(tensors)
        if len(tensors) == 1:
            # As `count_writes` does it, in 0.17 us and not 0.4; a ResNet-50 has 119 of these (CPU host).
            owed = f" and ({cell}.owed is None or {cell}.spent)" if edge.graded else ""
            n = f"len(region.calls) - {later}" if later else "len(region.calls)"
            yield f"increment(({written},)); n = {n}"
            yield f"if n > 0{owed}: region.counted.append((n, [{written}]))"
        elif later:
            raise Unsuited
        else:
            yield f"count_writes(region, [{written}], {w.bind(edge)})"


def under_lock(w: Writer, then: list[str], returned: str) -> None:
    """Step along: what is to be done then, and what is returned. Another thread may have ended the region meanwhile."""
    counts = [*_count(w)]
    w.lines += [
        "shared = recorder.shared",
        "if shared: recorder.lock.acquire()",
        "try:",
        "    if recorder.region is not region or region.node is not node: return MISS",
        *("    " + line for line in (*then, *counts, f"return {returned}")),
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


def compiled(w: Writer, head: str) -> Any:
    """The function of these arguments that consists of the lines."""
    return _maker(head, "\n        ".join(w.lines), tuple(w.constants))(*w.constants.values())


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
