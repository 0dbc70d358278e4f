"""Did a run of a region leave what eager would have left? If not, what is wrong first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kitsune.checking.compare import difference, same_bits, too_far
from kitsune.checking.eager_run import MEMORY, EagerRun, workspaces, workspaces_of
from kitsune.checking.inputs import Start
from kitsune.checking.search import Fault, Ran, Search
from kitsune.ir import Graph, Op, Value, storage_of


@dataclass(frozen=True)
class Verdict:
    """What is wrong, if anything is; how many tensors were compared, and whether all had eager's bits."""

    fault: Fault | None
    n_compared: int
    same: bool


def judge(ran: Ran) -> Verdict:
    """Compare a run with the recorded operators, run one by one from the same start."""
    eager = EagerRun(ran.graph, ran.start.values(), ran.scalars, ran.device)
    eager.state = ran.before
    try:
        left = eager.run()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return Verdict(Fault(None, None, f"eager raises {type(error).__name__}, and it does not: {error}"), 0, False)
    numbers = compared(ran.graph, ran.start)
    fault = _geometry(ran, left) or _surroundings(ran, eager)
    if fault is not None:
        return Verdict(fault, len(numbers), False)
    if all(same_bits(ran.values[v.id], left[v.id]) for v in numbers):
        return Verdict(None, len(numbers), True)
    # Memory for what follows.
    del eager, left
    return Verdict(_search(ran, numbers), len(numbers), False)


def compared(graph: Graph, start: Start) -> list[Value]:
    """What a run leaves: the values that somebody can still read and the inputs that it writes. What nobody has written since it
    was allocated, and workspaces, hold nothing to compare."""
    whole = {after.storage for op in graph.ops for before, after in op.rewritten if _covers(before, graph)}
    empty = {v.storage for op in graph.ops if op.target._opname.startswith(MEMORY) for v in op.results} - whole
    nothing = {number for op in graph.ops for number in workspaces(op)}
    outputs = {v.id: v for v in graph.outputs if v.storage not in empty and (v.id not in nothing or v.storage in whole)}
    outputs.update({v.id: v for v in graph.inputs if v.id in start.written})
    return sorted(outputs.values(), key=lambda v: v.id)


def _covers(written: Value, graph: Graph) -> bool:
    """Is a write one of all of its memory? Judged by the largest tensor on it."""
    sizes = [v.type.nbytes for op in graph.ops for v in op.results if v.storage == written.storage]
    return written.type.nbytes >= max(sizes, default=0)


def _geometry(ran: Ran, left: list[Any]) -> Fault | None:
    """Shapes, strides, dtypes, and who shares memory with whom."""
    values = (*ran.graph.inputs, *ran.graph.outputs)
    for v in ran.graph.outputs:
        got, eager = ran.values[v.id], left[v.id]
        told = [(t.shape, t.stride(), t.dtype) for t in (got, eager)]
        if told[0] != told[1]:
            return _fault(ran, v, f"its result has {told[0]} as shape, strides and dtype instead of {told[1]}")
    there, here = ([storage_of(of[v.id])._cdata for v in values] for of in (left, ran.values))
    for k, v in enumerate(values):
        if there.index(there[k]) != here.index(here[k]):
            other = values[min(there.index(there[k]), here.index(here[k]))]
            verb = "shares" if there.index(there[k]) == k else "does not share"
            return _fault(ran, v, f"its result {v} {verb} memory with {other}, unlike eager's")
    return None


def _surroundings(ran: Ran, eager: EagerRun) -> Fault | None:
    """The generator, and inputs that are only read."""
    spaces = {number for op in ran.graph.ops for number in workspaces_of(op)}
    if changed := [number for number in ran.start.changed() if number not in spaces]:
        value = next(v for v in ran.graph.inputs if v.id == changed[0])
        reader = next((op for op in ran.graph.ops if value in op.inputs), None)
        return Fault(reader, None, f"its operand {value} ({value.type}) is only read, and has changed")
    if not torch.equal(eager.state, ran.after):
        last = next((op for op in reversed(ran.graph.ops) if op.effects.random), None)
        return Fault(last, None, "the random generator is left in another state than by eager")
    return None


def maker_of(graph: Graph, value: Value) -> Op | None:
    """The op that a value comes from; of an input, the last one that writes it."""
    made = [op for op in graph.ops if any(v.id == value.id for v in op.outputs)]
    written = [op for op in graph.ops if value.storage in op.effects.writes]
    return next(iter(made or written[::-1]), None)


def _fault(ran: Ran, value: Value, sentence: str) -> Fault:
    return Fault(maker_of(ran.graph, value), None, sentence)


def _search(ran: Ran, numbers: list[Value]) -> Fault | None:
    walk = Search(ran).walk()
    if walk.fault is not None:
        return walk.fault
    apart = [v for v in numbers if not same_bits(ran.values[v.id], walk.values[v.id])]
    if not apart:
        return None
    # Some kernels of the libraries differ from run to run by themselves, now and then in a few elements only.
    may_differ = ran.device.type == "cuda" and not torch.are_deterministic_algorithms_enabled()
    again = Search(ran).walk()
    for v in apart:
        got, one, other = ran.values[v.id], walk.values[v.id], again.values[v.id]
        if (may_differ or not same_bits(one, other)) and too_far(
            got, other, one.double() if one.is_floating_point() else None
        ) is None:
            continue
        sentence = f"run launch by launch the plan agrees with eager, and run {ran.how} it does not: {difference(got, one)}"
        return _fault(ran, v, sentence)
    return None
