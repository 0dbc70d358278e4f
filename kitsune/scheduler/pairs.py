"""The two parts of a region that is run up to a cut and then goes on, prepared as one graph and taken apart again.

What the first part keeps for the second nobody else sees. By itself each part would be prepared for all that autograd saves, in
the layout that it was recorded in: a step of ResNet-50 would move 33 GB instead of 22, half of the rest of it copies of images
between two layouts, and one of GPT-2 43 GB instead of 30. Prepared as one graph they hand over what the second part reads, laid
out as it reads it. What is not handed over can be made again, should something else follow than was expected.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

from kitsune.ir import Graph, Kind, Op, Value
from kitsune.scheduler.passes import dead_code


@dataclass(frozen=True, eq=False)
class Pair:
    """The graphs of two parts, as they were recorded. `kept` are the results of the first that only the second sees, and
    `parameters` the storages of inputs that hold a model's parameters."""

    first: Graph
    kept: frozenset[int]
    second: Graph
    parameters: frozenset[int] = frozenset()

    @cached_property
    def whole(self) -> Graph:
        """Both parts as one graph, to tell pairs apart by."""
        return as_one(self, frozenset())


def made_by(ops: Iterable[Op]) -> dict[int, Value]:
    """What ops define, by number."""
    return {v.id: v for op in ops for v in op.outputs}


def storages_written(ops: Iterable[Op]) -> set[int]:
    """The storages that ops write."""
    return {storage for op in ops for storage in op.effects.writes}


def why_not_one(pair: Pair) -> str | None:
    """Why two parts cannot be one graph; None if they can."""
    first, second = pair.first, pair.second
    made, again = made_by(first.ops), made_by(second.ops)
    if not made.keys().isdisjoint(again):
        return "the first part was run with what was expected to follow it"
    came = {v.storage for v in first.inputs}
    changed = {v.storage for v in made.values()} - came | storages_written(first.ops)
    if not changed.isdisjoint(storages_written(second.ops)):
        return "the second part writes what the first has made or written"
    known = made.keys() | {v.id for v in first.inputs}
    if any(v.id not in known and v.storage in changed for v in second.inputs):
        return "what the first part has made was written before the second"
    return None


def as_one(pair: Pair, lasting: frozenset[int]) -> Graph:
    """Both parts. Of what is kept, it returns what is in `lasting`."""
    first, second = pair.first, pair.second
    known = made_by(first.ops).keys() | {v.id for v in first.inputs}
    inputs = first.inputs + tuple(v for v in second.inputs if v.id not in known)
    seen = tuple(v for v in first.outputs if v.id not in pair.kept or v.id in lasting)
    return Graph(inputs, first.ops + second.ops, seen + second.outputs)


def still_there(pair: Pair) -> list[Value]:
    """What came in for the first part and can be read once more behind the cut. A batch cannot: where autograd has saved nothing
    in its memory, the program may fill that again in between."""
    memory = {v.storage for v in pair.second.inputs} | pair.parameters
    return [v for v in pair.first.inputs if v.storage in memory]


def taken_apart(graph: Graph, pair: Pair) -> tuple[Graph, Graph] | None:
    """A graph that passes have made of both parts as two again. None if it cannot be told where the second one begins.

    The first returns what somebody sees, and what the second reads; views of that are made by the second itself.
    """
    made, again = made_by(pair.first.ops), made_by(pair.second.ops)
    begin = 1 + max((n for n, op in enumerate(graph.ops) if any(v.id in made for v in op.outputs)), default=-1)
    first, rest = graph.ops[:begin], graph.ops[begin:]
    if any(v.id in again for op in first for v in op.outputs):
        return None
    of_first = made_by(first)
    rest = _views_read(first, rest) + rest
    of_rest = made_by(rest)
    read = {v.id: v for op in rest for v in op.inputs if v.id not in of_rest}
    came = {v.storage for v in pair.first.inputs}
    handed = {n: v for n, v in read.items() if n in of_first and v.storage not in came}
    outputs = {v.id: v for v in graph.outputs if v.id in of_first} | handed
    given = {v.id for v in (*pair.second.inputs, *still_there(pair))} | handed.keys()
    inside = {v.id for v in pair.first.inputs} | of_first.keys()
    if not read.keys() <= given or any(v.id not in inside for op in first for v in op.inputs):
        return None
    if any(v.id not in of_rest for v in pair.second.outputs):
        return None
    return (
        dead_code(Graph(pair.first.inputs, first, tuple(outputs.values()), pair.first.awaited)),
        Graph(tuple(read.values()), rest, pair.second.outputs, pair.second.awaited),
    )


def _views_read(first: tuple[Op, ...], rest: tuple[Op, ...]) -> tuple[Op, ...]:
    """The views among the ops before that ops read, directly or by other views."""
    wanted = {v.id for op in rest for v in op.inputs}
    found = []
    for op in reversed(first):
        if is_true_view(op) and any(v.id in wanted for v in op.results):
            found.append(op)
            wanted.update(v.id for v in op.inputs)
    return tuple(reversed(found))


def is_true_view(op: Op) -> bool:
    """Is it a view that has not become a copy?"""
    return op.kind is Kind.VIEW and bool(op.inputs) and all(v.storage == op.inputs[0].storage for v in op.results)


class Restoring:
    """How what is kept is had from what the first part hands over: by `ops` in their order, from the values `given`. What is
    `missing`, by number, can be had in no such way."""

    def __init__(self, pair: Pair, first: Graph) -> None:
        self.kept = {n: v for n, v in made_by(pair.first.ops).items() if n in pair.kept}
        self._versions: dict[int, int] = {}
        for value in (after for op in pair.first.ops for _, after in op.rewritten):
            self._versions[value.storage] = max(value.version, self._versions.get(value.storage, 0))
        handed = {v.id: v for v in first.outputs}
        self._there = {v.id: v for v in still_there(pair) if self._lasts(v)}
        self._makers: dict[int, Op] = {}
        for op in pair.first.ops:
            for value in op.outputs:
                if value.id in handed and self._lasts(value) and _same_contents(handed[value.id], value):
                    self._there[value.id] = value
                elif self._may_be_made(op, value):
                    self._makers[value.id] = op
        self.missing = frozenset(self.kept.keys() - self._there.keys() - self._makers.keys())
        self.given: dict[int, Value] = {}
        needed: set[int] = set()
        wanted = self.kept.keys() - self.missing
        while wanted:
            number = wanted.pop()
            if number in self._there:
                self.given[number] = self._there[number]
            elif id(op := self._makers[number]) not in needed:
                needed.add(id(op))
                wanted |= {v.id for v in op.inputs}
        self.ops = tuple(op for op in pair.first.ops if id(op) in needed)

    def _lasts(self, value: Value) -> bool:
        """Is it not written any more?"""
        return value.version == self._versions.get(value.storage, 0)

    def _may_be_made(self, op: Op, value: Value) -> bool:
        """May an op be made again for a value, by which nobody else notices?"""
        if op.effects.random or not self._lasts(value):
            return False
        # Of an op that writes, what it has written was another value before.
        return all(v.id in self._there or v.id in self._makers for v in op.inputs)


def _same_contents(now: Value, recorded: Value) -> bool:
    a, b = now.type, recorded.type
    return (a.shape, a.dtype, a.conj, a.neg) == (b.shape, b.dtype, b.conj, b.neg)


def fleeting(pair: Pair) -> frozenset[int]:
    """The storages that came in for the first part and are not to be read behind the cut."""
    return frozenset(v.storage for v in pair.first.inputs).difference(v.storage for v in still_there(pair))


def prepared(pair: Pair, passes: Callable[[Graph], Graph]) -> tuple[Graph, Graph] | None:
    """Both parts after passes over both as one; None where they stay apart."""
    if why_not_one(pair) is not None:
        return None
    lasting: frozenset[int] = frozenset()
    while True:
        halves = taken_apart(passes(as_one(pair, lasting)), pair)
        missing = frozenset() if halves is None else Restoring(pair, halves[0]).missing
        if not missing:
            return halves
        if missing <= lasting:
            return None
        lasting |= missing
