"""What is captured of a region: its prepared plan, or its ops one by one."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from kitsune.ir import Launch
from kitsune.runtime.captured import Work
from kitsune.runtime.frame import Pool, Startable
from kitsune.runtime.instructions import Instruction, Start, StartInGraph
from kitsune.runtime.plan_executor import PlanExecutor, Prepared
from kitsune.runtime.replay import Schedule, replay
from kitsune.runtime.slots import SlotTable

# The launch, what starts it in an ordinary run, and the table that its moving numbers are read from.
PrepareInGraph = Callable[[Launch, Any, SlotTable], "StartableInGraph"]


class StartableInGraph(Startable, Protocol):
    """Kernels that a capture starts. `fill_tables` writes what they read from memory, once the capture is over."""

    def fill_tables(self) -> None: ...


@dataclass(eq=False)
class Arena:
    """An arena that graphs share: each uses it from beginning to end of its replay only, and replays do not overlap."""

    tensor: torch.Tensor
    address: int
    notes: dict[Any, Any] = field(default_factory=dict)


class Arenas:
    """The arenas of a thread's graphs, kept as long as a graph uses them."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._alive: weakref.WeakSet[Arena] = weakref.WeakSet()

    def arena(self, nbytes: int, device: torch.device, stream: int) -> Arena:
        """The smallest that has room, or a new one. Raises torch.OutOfMemoryError."""
        fitting = [arena for arena in self._alive if arena.tensor.numel() >= nbytes and arena.tensor.device == device]
        if fitting:
            arena = min(fitting, key=lambda arena: arena.tensor.numel())
        else:
            block = self._pool.take(nbytes, device, stream)
            arena = Arena(block.tensor, block.address)
            # Ordinary runs may use it as well, in between.
            self._pool.give(block)
            self._alive.add(arena)
        return arena


def plan_work(
    executor: PlanExecutor, prepared: Prepared, prepare: PrepareInGraph, table: SlotTable, arenas: Arenas, stream: int
) -> Work:
    """A plan's launches and library calls. Kernels that ordinary runs have given up are run op by op here, too."""
    started: list[StartableInGraph] = []

    def in_graph(instruction: Instruction) -> Instruction:
        if not isinstance(instruction, Start):
            return instruction
        usable = instruction.prepared if instruction.program not in instruction.broken else None
        startable = None if usable is None else prepare(instruction.launch, usable, table)
        if startable is not None:
            started.append(startable)
        return StartInGraph(instruction.launch, instruction.places, startable)

    inside = replace(prepared, instructions=tuple(in_graph(i) for i in prepared.instructions))
    arena = arenas.arena(prepared.plan.arena, prepared.device, stream) if prepared.layout.arena else None

    def finish() -> None:
        for startable in started:
            startable.fill_tables()

    return Work(lambda values, scalars: executor.trace(inside, arena, values, scalars), finish, [arena, table])


def schedule_work(schedule: Schedule, table: SlotTable) -> Work:
    """A region's ops one by one."""
    return Work(lambda values, scalars: replay(schedule, values, scalars), keep=[table])
