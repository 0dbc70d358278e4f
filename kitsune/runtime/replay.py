"""The replay executor: a region's ops through aten, in program order, on any device.

Drops each value after its last use, as eager's reference counts would.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from operator import length_hint
from typing import Any, NamedTuple

import torch

from kitsune.ir import Graph, Op, TensorType
from kitsune.runtime.calls import Call, call_of
from kitsune.runtime.fallback import may_have_begun

# Below autograd these return what they are given. A training step of ResNet-50 has 262 of them among 794 ops. (By id: overloads
# hash and compare in Python.)
_SAME = frozenset(map(id, (torch.ops.aten.detach.default, torch.ops.aten.alias.default)))


class Instruction(NamedTuple):
    """An op, what to drop after it, and what makes its call; None where its result is its operand, and may be the very tensor. (A
    frozen dataclass takes three times as long to make.)"""

    op: Op
    drops: tuple[int, ...]
    make: Call | None


@dataclass(slots=True)
class Schedule:
    """A graph, ready to run. `nbytes` of memory are in use at most, of what the ops make."""

    instructions: tuple[Instruction, ...]
    nbytes: int


def prepare(graph: Graph) -> Schedule:
    """Decide when a graph's values die."""
    instructions = []
    seen = {v.id for v in graph.outputs} | {v.id for v in graph.inputs}
    one = _Tensors(graph)
    for op in reversed(graph.ops):
        drops = []
        for values in (op.inputs, op.outputs):
            for value in values:
                if value.id not in seen:
                    seen.add(value.id)
                    drops.append(value.id)
        is_same = id(op.target) in _SAME and one.joined(op.inputs[0].id, op.results[0].id)
        instructions.append(Instruction(op, tuple(drops), None if is_same else call_of(op)))
    return Schedule(tuple(reversed(instructions)), most_in_use(graph))


class _Tensors:
    """Which values are one tensor: the versions of one that is written, and those that are joined. Nobody outside gets the same
    tensor twice, nor one that came in; and no op does, since some look: index_add_ refuses the tensor that it writes as the one
    to be added, where it takes it detached."""

    def __init__(self, graph: Graph) -> None:
        self._above = {after.id: before.id for op in graph.ops for before, after in op.rewritten}
        # By tensor, the ops that take it; of those that may be joined.
        self._taken: dict[int, set[int]] = {}
        for op in graph.ops:
            if id(op.target) in _SAME:
                self._taken[self._of(op.inputs[0].id)] = set()
                self._taken[self._of(op.results[0].id)] = set()
        above, taken = self._above, self._taken
        for number, op in enumerate(graph.ops):
            for value in op.inputs:
                tensor = self._of(value.id) if value.id in above else value.id
                if tensor in taken:
                    taken[tensor].add(number)
        # By tensor, how many of its values are known outside.
        self._known = Counter(self._of(value.id) for value in {*graph.outputs, *graph.inputs})

    def joined(self, a: int, b: int) -> bool:
        """May two values be one tensor? Then they are from now on."""
        a, b = self._of(a), self._of(b)
        if self._known[a] + self._known[b] > 1 or not self._taken[a].isdisjoint(self._taken[b]):
            return False
        self._known[a] += self._known[b]
        self._taken[a] |= self._taken[b]
        self._above[b] = a
        return True

    def _of(self, value: int) -> int:
        """The first value of its tensor. All on the way there are led to it from then on, or ways would grow with the graph."""
        way = []
        while value in self._above:
            way.append(value)
            value = self._above[value]
        if way:
            self._above.update(dict.fromkeys(way, value))
        return value


def most_in_use(graph: Graph) -> int:
    """Bytes that are in use at most, of what the ops make, if each value dies after its last use."""
    kept, given = {v.storage for v in graph.outputs}, {v.storage for v in graph.inputs}
    change = [0] * (len(graph.ops) + 1)
    made: dict[int, TensorType] = {}
    last: dict[int, int] = {}
    for k, op in enumerate(graph.ops):
        for value in op.inputs:
            last[value.storage] = k + 1
        for value in op.results:
            if value.storage not in made and value.storage not in given:
                made[value.storage] = value.type
                change[k] += _extents(value.type)
            last[value.storage] = k + 1
    for storage in made.keys() - kept:
        change[last[storage]] -= _extents(made[storage])
    return max(accumulate(change))


# Types are few, and this is asked twice of every value that an op makes.
@lru_cache(4096)
def _extents(type_: TensorType) -> int:
    return type_.extent_bytes if type_.device.type != "cpu" else 0


def replay(schedule: Schedule, values: list[Any], scalars: list[float], relieve: Callable[[], None] | None = None) -> None:
    """Run a schedule. `values` holds the inputs by value number and receives the outputs, also of the ops before a failure.

    With `relieve`, which frees what is kept for later runs, an op for which memory runs out is tried once more.
    """
    instructions, lacked, graded = schedule.instructions, -1, torch.is_grad_enabled()
    left = iter(instructions)
    while True:
        try:
            return _go_on(left, values, scalars, graded)
        except torch.OutOfMemoryError:
            position = len(instructions) - length_hint(left) - 1
            if relieve is None or position == lacked or may_have_begun(instructions[position].op):
                raise
        finally:
            torch._C._set_grad_enabled(graded)
        # Outside of the handler: the error would keep alive what the call had allocated.
        relieve()
        left, lacked = iter(instructions[position:]), position


def _go_on(left: Iterator[Instruction], values: list[Any], scalars: list[float], graded: bool) -> None:
    for op, drops, make in left:
        if make is None:
            values[op.results[0].id] = values[op.inputs[0].id]
        else:
            # Ops in a row mostly want the same, and others do not ask: 82 of ResNet-18's 220 do, each for 2 us (CPU host).
            if op.grad_enabled is not None and op.grad_enabled is not graded:
                graded = op.grad_enabled
                torch._C._set_grad_enabled(graded)
            make(op, values, scalars)
        for number in drops:
            values[number] = None
