"""A plan, run launch by launch on its own, so that each value can be looked at when it has been made."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from kitsune.ir import Graph, Kind, Launch, Op, Plan, Value, storage_of, storages_of, streams
from kitsune.ir.graph import OVERWRITES
from kitsune.memory import MemoryPool
from kitsune.runtime import PlanExecutor, Prepared
from kitsune.runtime.fallback import tensor_of
from kitsune.runtime.frame import Frame, storage_offset
from kitsune.runtime.instructions import Drop

_set = torch.ops.aten.set_.source_Storage_storage_offset


def op_by_op(graph: Graph) -> Plan:
    """The plan of a region that is run operator by operator."""
    launches = tuple(Launch(op=op) for op in graph.ops)
    return Plan(graph, launches, {}, 0, ())


def apart(plan: Plan) -> Plan:
    """The same launches, with memory of its own for each value: nothing can be overwritten that is still needed."""
    last: dict[int, int] = {}
    for k, launch in enumerate(plan.launches):
        last.update(dict.fromkeys(storages_of(launch), k))
    for storage in {v.storage for v in (*plan.graph.inputs, *plan.graph.outputs)}:
        last.pop(storage, None)
    drops: list[list[int]] = [[] for _ in plan.launches]
    for storage, k in last.items():
        drops[k].append(storage)
    return replace(plan, offsets={}, arena=0, drops=tuple(map(tuple, drops)))


def executor_of(prepare_launch: Callable[[Launch], Any]) -> PlanExecutor:
    """An executor that tells nobody what it mends, and keeps no memory."""
    return PlanExecutor(prepare_launch, MemoryPool(0), lambda sentence: None)


class PlanRun:
    """One run of a plan. `step()` goes on by one launch."""

    def __init__(self, executor: PlanExecutor, prepared: Prepared, values: list[Any], scalars: list[float]) -> None:
        self.prepared, self.plan = prepared, prepared.plan
        self.frame = Frame(prepared.layout, values, scalars, streams.current_handle(prepared.device), poisoned=True)
        self._pool, self._places = executor.pool, prepared.places
        if prepared.layout.arena:
            self.frame.move_in(executor.pool.take(prepared.plan.arena, prepared.device, self.frame.stream))
            # Not under the plan's own key: what is kept with a block is for ordinary runs.
            self.frame.furnish(self, lambda frame: {v.id: tensor_of(v, prepared.places, frame) for v in prepared.furnish})
        self._views = views_by_base(prepared.plan.graph)
        self._steps = self._run()

    def step(self) -> list[Value]:
        """Run the next launch; returns the values that it has made, which `look` shows until the next step."""
        return next(self._steps)

    def finish(self) -> list[Any]:
        """Run what follows the last launch, and give the arena back. Returns the values by number."""
        for _ in self._steps:
            pass
        self.close()
        return self.frame.values

    def close(self) -> None:
        """Give the arena back."""
        if self.frame.block is not None:
            self.frame.block.notes.pop(self, None)
            self._pool.give(self.frame.block)
            self.frame.block = None

    def look(self, value: Value) -> torch.Tensor | None:
        """A tensor over what is in the memory of a value now; None if it has none."""
        frame, places = self.frame, self._places
        found: torch.Tensor | None = frame.values[value.id]
        if found is not None:
            return found
        root = places.root[value.id]
        base = frame.memory.get(root.id)
        if base is None:
            base = frame.memory_of(root.id) if root.id in frame.layout.arena else frame.values[root.id]
        if base is None:
            return None
        place = places.place(value)
        start = place.nbytes + (0 if place.from_start else storage_offset(base) * base.itemsize)
        type_ = value.type
        made = torch.empty(0, dtype=type_.dtype, device=type_.device)
        _set(made, storage_of(base), start // type_.dtype.itemsize, type_.shape, type_.stride)
        torch._C._set_conj(made, type_.conj)
        torch._C._set_neg(made, type_.neg)
        return made

    def _run(self) -> Iterator[list[Value]]:
        instructions, position = self.prepared.instructions, 0
        while position < len(instructions) and instructions[position].at < 0:
            instructions[position].run(self.frame)
            position += 1
        for k, launch in enumerate(self.plan.launches):
            while position < len(instructions) and instructions[position].at == k:
                if isinstance(instructions[position], Drop):
                    break
                instructions[position].run(self.frame)
                position += 1
            yield made_by(launch, self._views)
            while position < len(instructions) and instructions[position].at == k:
                instructions[position].run(self.frame)
                position += 1
        for instruction in instructions[position:]:
            instruction.run(self.frame)


def views_by_base(graph: Graph) -> dict[int, list[Value]]:
    """The views of each value, by its number."""
    found: dict[int, list[Value]] = {}
    for op in graph.ops:
        if op.kind is Kind.VIEW:
            found.setdefault(op.inputs[0].id, []).extend(v for v in op.results if v.storage == op.inputs[0].storage)
    return found


def made_by(launch: Launch, views: dict[int, list[Value]]) -> list[Value]:
    """The values that are in memory once a launch is done: what kernels store, what a call returns and writes; with views."""
    if launch.op is not None:
        found = [] if launch.op.allocates or launch.op.kind is Kind.VIEW else list(launch.op.outputs)
    else:
        found = [store.access.value for kernel in launch.kernels for store in kernel.stores]
    for value in found:
        # The list grows: views of views.
        found.extend(views.get(value.id, ()))
    return found


def operands_of(launch: Launch) -> list[Value]:
    """The values that a launch reads from memory."""
    if launch.op is not None:
        return _read(launch.op)
    return [access.value for kernel in launch.kernels for access in kernel.loads]


def _read(op: Op) -> list[Value]:
    if op.starts_nothing:
        return []
    # What is overwritten may hold anything before.
    lost = {before.id for before, _ in op.rewritten} if op.effects.random or op.target._opname in OVERWRITES else set()
    return [v for v in op.inputs if v.id not in lost]
