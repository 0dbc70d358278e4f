"""What is captured of a region: its prepared plan, or its ops one by one."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from kitsune.ir import Graph, Launch, Op
from kitsune.runtime.captured import Work
from kitsune.runtime.frame import Frame, Pool, Startable
from kitsune.runtime.instructions import Alias, Call, CallInto, Drop, Instruction, Publish, Start, StartInGraph
from kitsune.runtime.places import Places
from kitsune.runtime.plan_executor import PlanExecutor, Prepared
from kitsune.runtime.replay import Schedule, replay
from kitsune.runtime.slots import SlotTable
from kitsune.runtime.tail import Tail, may_stay_outside, needs_of, reads

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
    executor: PlanExecutor,
    prepared: Prepared,
    prepare: PrepareInGraph,
    table: SlotTable,
    arenas: Arenas,
    stream: int,
    moved: frozenset[int] = frozenset(),
) -> Work:
    """A plan's launches and library calls. Kernels that ordinary runs have given up are run op by op here, too.

    A library call that takes one of the numbers in `moved` is left to the tail.
    """
    started: list[StartableInGraph] = []

    def in_graph(instruction: Instruction) -> Instruction:
        if not isinstance(instruction, Start):
            return instruction
        usable = instruction.prepared if instruction.program not in instruction.broken else None
        startable = None if usable is None else prepare(instruction.launch, usable, table)
        if startable is not None:
            started.append(startable)
        return StartInGraph(instruction.launch, instruction.places, startable)

    instructions = tuple(in_graph(i) for i in prepared.instructions)
    cut = _cut(prepared, instructions, moved)
    inside = replace(prepared, instructions=instructions[:cut])
    arena = arenas.arena(prepared.plan.arena, prepared.device, stream) if prepared.layout.arena else None
    left = _LeftOut(tuple(i for i in instructions[cut:] if not isinstance(i, Drop))) if cut < len(instructions) else None

    def run(values: list[Any], scalars: list[float]) -> None:
        frame = executor.trace(inside, arena, values, scalars)
        if left is not None:
            left.follows(frame)

    def finish() -> None:
        for startable in started:
            startable.fill_tables()

    tail = None if left is None else Tail(needs_of(op for i in left.instructions for op in _calls(i)), left.run)
    return Work(run, finish, [arena, table], tail)


class _LeftOut:
    """The last instructions of a plan, run in the frame that the capture of the others has left."""

    def __init__(self, instructions: tuple[Instruction, ...]) -> None:
        self.instructions = instructions
        self._frame: Frame | None = None

    def follows(self, frame: Frame) -> None:
        """What came in must not be kept."""
        self._frame, frame.values = frame, []

    def run(self, values: list[Any], scalars: list[float]) -> None:
        """Raises what the ops raise."""
        frame = self._frame
        assert frame is not None
        frame.values, frame.scalars = values, scalars
        try:
            for instruction in self.instructions:
                instruction.run(frame)
        finally:
            frame.values = []


def _calls(instruction: Instruction) -> tuple[Op, ...]:
    return (instruction.op,) if isinstance(instruction, (Call, CallInto)) else ()


def _cut(prepared: Prepared, instructions: tuple[Instruction, ...], moved: frozenset[int]) -> int:
    """Where the tail begins, if the rest can be one; the end of the instructions if not."""
    end, places = len(instructions), prepared.places
    if not moved:
        return end
    cut = next((k for k, i in enumerate(instructions) if any(reads(op, moved) for op in _calls(i))), end)
    rest = [i for i in instructions[cut:] if not isinstance(i, Drop)]
    ops = [op for i in rest for op in (i.launch.ops if isinstance(i, StartInGraph) else _calls(i))]
    simple = all(
        isinstance(i, (Call, Alias, Publish)) or (isinstance(i, StartInGraph) and i.prepared is not None) for i in rest
    )
    whole = simple and may_stay_outside(prepared.plan.graph, ops, lambda v: places.root[v.id].id in places.inputs)
    return cut if whole else end


def schedule_work(schedule: Schedule, table: SlotTable, graph: Graph, moved: frozenset[int] = frozenset()) -> Work:
    """A region's ops one by one; from the first that takes one of the numbers in `moved`, they are the tail if they can be."""
    instructions = schedule.instructions
    cut = next((k for k, i in enumerate(instructions) if moved and reads(i.op, moved)), len(instructions))
    rest, tail = [i.op for i in instructions[cut:]], None
    if rest:
        places = Places(graph)
        if may_stay_outside(graph, rest, lambda v: places.root[v.id].id in places.inputs):
            left = Schedule(instructions[cut:])
            schedule = Schedule(instructions[:cut])
            tail = Tail(needs_of(rest), lambda values, scalars: replay(left, values, scalars))
    return Work(lambda values, scalars: replay(schedule, values, scalars), keep=[table], tail=tail)
