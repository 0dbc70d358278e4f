"""The end of a region that stays outside of its graph: from the first op that takes a number which moves and cannot read it
from memory.

AdamW's fused update takes the learning rate by value. Its variant that takes a tensor reads a float32, and would round every
learning rate that is none. So the graph ends before such an op, and the op is called after each replay, as in eager.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kitsune.ir import Graph, Op, Value, reads_slots, slots_in

# What is launched one by one must be little beside what the graph launches at once: an optimizer's update is some twenty ops.
FEW = 32
SHARE = 0.25


@dataclass(frozen=True, slots=True)
class Tail:
    """`run(values, scalars)` does the rest of a region's work; `values` are what came in and `needs`, made before it."""

    needs: tuple[Value, ...]
    run: Callable[[list[Any], list[float]], None]


def reads(op: Op, moved: frozenset[int]) -> bool:
    """Does an op take one of these moving numbers?"""
    # Most take none.
    return reads_slots(op) and any(slot.index in moved for slot in slots_in((op.args, op.kwargs)))


def may_stay_outside(graph: Graph, tail: Sequence[Op], root_of: Mapping[int, Value]) -> bool:
    """Are these last ops few, and is what they make of no use to anybody after the region? They may write what was there."""
    if len(tail) > max(FEW, SHARE * len(graph.ops)):
        return False
    made = {v.id for op in tail for v in op.results}
    return not any(v.id in made or root_of[v.id].id in made for v in graph.outputs)


def needs_of(tail: Iterable[Op]) -> tuple[Value, ...]:
    """The values that these ops read and do not make."""
    needs: dict[int, Value] = {}
    made: set[int] = set()
    for op in tail:
        needs.update((v.id, v) for v in op.inputs if v.id not in made)
        made.update(v.id for v in op.outputs)
    return tuple(needs.values())
