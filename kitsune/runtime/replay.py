"""The replay executor: a region's ops through aten, in program order, on any device.

Drops each value after its last use, as eager's reference counts would.
"""

from dataclasses import dataclass
from typing import Any

from kitsune.ir import Graph, Op
from kitsune.runtime.calls import call


@dataclass(frozen=True, slots=True)
class Instruction:
    """An op, ready to call: what to drop after it, and whether its results may turn out other than expected."""

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
        drops = []
        for value in (*op.inputs, *op.outputs):
            if value.id not in seen:
                seen.add(value.id)
                drops.append(value.id)
        instructions.append(Instruction(op, tuple(drops)))
    return Schedule(tuple(reversed(instructions)))


def replay(schedule: Schedule, values: list[Any], scalars: list[float]) -> None:
    """Run a schedule. `values` holds the inputs by value number and receives the outputs, also of the ops before a failure."""
    for instruction in schedule.instructions:
        call(instruction.op, values, scalars)
        for number in instruction.drops:
            values[number] = None
