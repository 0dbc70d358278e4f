"""The replay executor: a region's ops through aten, in program order, on any device.

Computes only what somebody can still read, and drops each value after its last use, as eager's reference counts would.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import torch

from kitsune.ir import Graph, Kind, Op, Result, Slot, TensorType, Value, type_of


@dataclass(frozen=True, slots=True)
class Instruction:
    """An op, ready to call: what to drop after it, and whether its results may turn out other than expected."""

    op: Op
    drops: tuple[int, ...]


@dataclass(slots=True)
class Schedule:
    """What is run of a graph: `n_dead` ops were recorded and are needed by nobody."""

    instructions: tuple[Instruction, ...]
    n_dead: int


def prepare(graph: Graph) -> Schedule:
    """Decide which ops of a graph to run and when its values die."""
    kept = needed_ops(graph)
    keep_alive = {v.id for v in graph.outputs} | {v.id for v in graph.inputs}
    instructions = []
    seen = set(keep_alive)
    for op in reversed(kept):
        used = {v.id for v in op.inputs + op.outputs} - seen
        seen |= used
        instructions.append(Instruction(op, tuple(used)))
    return Schedule(tuple(reversed(instructions)), len(graph.ops) - len(kept))


def needed_ops(graph: Graph) -> list[Op]:
    """The ops whose effects somebody can see. Judged by storage: a dead base may have a living view."""
    needed = {v.storage for v in graph.inputs} | {v.storage for v in graph.outputs}
    kept = []
    for op in reversed(graph.ops):
        # A view of an input shares its storage but changes nothing: needed only if it is read, which its value says.
        if (
            op.effects.random
            or any(s in needed for s in op.effects.writes)
            or any(_is_needed(v, needed, graph, op) for v in op.results)
        ):
            kept.append(op)
            needed.update(v.storage for v in op.inputs)
            needed.update(v.id + _VALUE for v in op.inputs)
    return kept[::-1]


# Values and storages are numbered apart; one set holds both.
_VALUE = 1 << 40


def _is_needed(value: Value, needed: set[int], graph: Graph, op: Op) -> bool:
    if op.kind is Kind.VIEW:
        return value.id + _VALUE in needed or value in graph.outputs
    return value.storage in needed


def replay(schedule: Schedule, values: list[Any], scalars: list[float]) -> None:
    """Run a schedule. `values` holds the inputs by value number and receives the outputs, also of the ops before a failure."""
    for instruction in schedule.instructions:
        op = instruction.op
        args = [_bind(a, values, scalars) for a in op.args]
        kwargs = {name: _bind(a, values, scalars) for name, a in op.kwargs}
        try:
            if op.grad_enabled is None:
                result = op.target(*args, **kwargs)
            else:
                with torch.set_grad_enabled(op.grad_enabled):
                    result = op.target(*args, **kwargs)
            if op.results:
                _store(op.structure, result, op, values)
        except Exception as error:
            _name_the_line(error, op)
            raise
        for before, after in op.rewritten:
            values[after.id] = values[before.id]
        for number in instruction.drops:
            values[number] = None


def _bind(argument: Any, values: list[Any], scalars: list[float]) -> Any:
    cls = type(argument)
    if cls is Value:
        return values[argument.id]
    if cls is Slot:
        return scalars[argument.index]
    if cls is tuple:
        return [_bind(a, values, scalars) for a in argument]
    return argument


def _store(structure: Any, result: Any, op: Op, values: list[Any]) -> None:
    if type(structure) is Result:
        value = op.results[structure.index]
        if result.shape != value.type.shape or result.stride() != value.type.stride or result.dtype is not value.type.dtype:
            result = _conform(result, value.type, op)
        values[value.id] = result
    elif isinstance(structure, (list, tuple)):
        for part, leaf in zip(structure, result, strict=True):
            _store(part, leaf, op, values)


def _conform(result: torch.Tensor, expected: TensorType, op: Op) -> torch.Tensor:
    """A result in another layout than the program was told is copied into that layout; any other difference is an error."""
    difference = (
        f"{op.target} at {op.site} returned {type_of(result)} with strides {result.stride()} where {expected} with strides "
    )
    difference += f"{expected.stride} was expected. This is a bug in Kitsune: please report it."
    if result.shape != expected.shape or result.dtype is not expected.dtype:
        raise RuntimeError(f"{difference} KITSUNE=0 runs the program without Kitsune.")
    warnings.warn(difference, RuntimeWarning, stacklevel=2)
    laid_out = torch.empty_strided(expected.shape, expected.stride, dtype=expected.dtype, device=expected.device)
    return laid_out.copy_(result)


def _name_the_line(error: Exception, op: Op) -> None:
    note = f"while running {op.target}, recorded by Kitsune at {op.site}"
    if hasattr(error, "add_note"):
        error.add_note(note)
    elif error.args and isinstance(error.args[0], str):
        error.args = (f"{error.args[0]}\n{note}", *error.args[1:])
