"""The replay executor: a region's ops through aten, in program order, on any device.

Drops each value after its last use, as eager's reference counts would.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

from kitsune.ir import Graph, Op
from kitsune.runtime.calls import call


class Instruction(NamedTuple):
    """An op, and what to drop after it. (A frozen dataclass takes three times as long to make.)"""

    op: Op
    drops: tuple[int, ...]


@dataclass(slots=True)
class Schedule:
    """A graph, ready to run."""

    instructions: tuple[Instruction, ...]


def prepare(graph: Graph) -> Schedule:
    """Decide when a graph's values die."""
    instructions = []
    seen = {v.id for v in graph.outputs} | {v.id for v in graph.inputs}
    for op in reversed(graph.ops):
        drops = [number for value in (*op.inputs, *op.outputs) if (number := value.id) not in seen]
        seen.update(drops)
        instructions.append(Instruction(op, tuple(drops)))
    return Schedule(tuple(reversed(instructions)))


def most_in_use(graph: Graph) -> int:
    """Bytes that are in use at most, of what the ops make, if each value dies after its last use."""
    kept, given = {v.storage for v in graph.outputs}, {v.storage for v in graph.inputs}
    change = [0] * (len(graph.ops) + 1)
    nbytes: dict[int, int] = {}
    last: dict[int, int] = {}
    for k, op in enumerate(graph.ops):
        for value in op.outputs:
            if value.storage not in nbytes and value.storage not in given:
                nbytes[value.storage] = value.type.extent_bytes if value.type.device.type != "cpu" else 0
                change[k] += nbytes[value.storage]
        last.update((value.storage, k + 1) for value in (*op.inputs, *op.outputs))
    for storage in nbytes.keys() - kept:
        change[last[storage]] -= nbytes[storage]
    return max(accumulate(change))


def replay(schedule: Schedule, values: list[Any], scalars: list[float]) -> None:
    """Run a schedule. `values` holds the inputs by value number and receives the outputs, also of the ops before a failure."""
    for op, drops in schedule.instructions:
        call(op, values, scalars)
        for number in drops:
            values[number] = None
