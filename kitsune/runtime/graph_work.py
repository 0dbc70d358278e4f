"""What is captured of a region: its prepared plan, or its ops one by one."""

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from kitsune.ir import Graph, Kind, Launch, Op, Value, streams
from kitsune.runtime.branches import reaches_device
from kitsune.runtime.capturable import GraphFacts
from kitsune.runtime.captured import Work
from kitsune.runtime.cuda_graph import Sending
from kitsune.runtime.frame import Frame, Pool, Startable
from kitsune.runtime.instructions import Alias, Call, CallInto, Drop, Instruction, Publish, Send, Start, StartInGraph
from kitsune.runtime.plan_executor import PlanExecutor, Prepared
from kitsune.runtime.replay import Schedule, replay
from kitsune.runtime.slots import SlotTable
from kitsune.runtime.tail import Tail, may_stay_outside, needs_of, reads

# Launches that are left when the last awaited value is there. A second graph costs the host what a few launches cost the device.
WORTH_SENDING = 8
# The launch, what starts it in an ordinary run, and the table that its moving numbers are read from.
PrepareInGraph = Callable[[Launch, Any, SlotTable], "StartableInGraph"]


class StartableInGraph(Startable, Protocol):
    """Kernels that a capture starts. `fill_tables` writes what they read from memory, once the capture is over."""

    def fill_tables(self) -> None: ...


@dataclass(eq=False)
class Arena:
    """An arena that graphs share: each uses it from beginning to end of its replay only, and replays do not overlap. It is in a
    block of the pool."""

    block: Any
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
            arena = Arena(block, block.tensor, block.address)
            # Ordinary runs may use it as well, in between.
            self._pool.share(block)
            self._pool.give(block)
            self._alive.add(arena)
        return arena

    def scratch(self, nbytes: int, device: torch.device) -> torch.Tensor | None:
        """Memory with room for so many bytes, for whoever is done with it before the next replay; None where no arena has it."""
        fitting = [arena.tensor for arena in self._alive if arena.tensor.device == device and arena.tensor.numel() >= nbytes]
        return min(fitting, key=torch.Tensor.numel, default=None)


def plan_work(
    executor: PlanExecutor,
    prepared: Prepared,
    prepare: PrepareInGraph,
    table: SlotTable,
    arenas: Arenas,
    moved: frozenset[int] = frozenset(),
    awaited: tuple[int, ...] = (),
) -> Work:
    """A plan's launches and library calls. Kernels that ordinary runs have given up are run op by op here, too.

    A library call that takes one of the numbers in `moved` is left to the tail. The values `awaited` are sent as soon as all of
    them are there.
    """
    started: list[StartableInGraph] = []

    def in_graph(instruction: Start) -> Instruction:
        usable = instruction.prepared if instruction.program not in instruction.broken else None
        startable = None if usable is None else prepare(instruction.launch, usable, table)
        if startable is not None:
            started.append(startable)
        return StartInGraph(instruction.launch, instruction.places, startable, at=instruction.at)

    instructions = tuple([in_graph(i) if isinstance(i, Start) else i for i in prepared.instructions])
    head, rest = _divided(prepared, instructions, moved) if moved else (instructions, ())
    there = _when_there(awaited, map(_left_by, head))
    if there is None or sum(map(reaches_device, head[there:])) < WORTH_SENDING:
        there, awaited = None, ()
    sending: list[Sending] = []
    sends = () if there is None else (Send(awaited, lambda tensors: sending[0](tensors)),)
    inside = replace(prepared, instructions=(*head[:there], *sends, *head[there:]) if sends else head)
    device, layout = prepared.device, prepared.layout
    if prepared.branches is not None:
        prepared.branches.make_streams()
    arena = arenas.arena(prepared.plan.arena, device, streams.current_handle(device)) if layout.arena else None
    left = _LeftOut(rest) if rest else None

    def run(values: list[Any], scalars: list[float], send: Sending) -> None:
        sending[:] = [send]
        frame = executor.trace(inside, arena, values, scalars)
        if left is not None:
            left.follows(frame)

    def finish() -> None:
        for startable in started:
            startable.fill_tables()

    tail = None if left is None else Tail(_needs(rest, prepared.plan.graph), left.run)
    return Work(run, finish, [arena, table], tail, awaited, prepared.plan.outside)


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


def _left_by(instruction: Instruction) -> set[int]:
    """The values of which there are tensors after it."""
    return {instruction.number} if isinstance(instruction, Publish) else _made_by(instruction)


def _when_there(awaited: tuple[int, ...], made: Iterable[set[int]]) -> int | None:
    """How many steps it takes until all of these values are there, given what each makes; None if they never are, or there are
    none."""
    missing = {*awaited}
    for k, values in enumerate(made if missing else ()):
        missing -= values
        if not missing:
            return k + 1
    return None


def _needs(instructions: Sequence[Instruction], graph: Graph) -> tuple[Value, ...]:
    """The values that instructions read and do not bring about."""
    by_number = {v.id: v for v in (*graph.inputs, *(v for op in graph.ops for v in op.outputs))}
    needs: dict[int, Value] = {}
    made: set[int] = set()
    for i in instructions:
        read = [v for op in _calls(i) for v in op.inputs] + ([by_number[i.before]] if isinstance(i, Alias) else [])
        needs.update((v.id, v) for v in read if v.id not in made)
        made |= _made_by(i)
    return tuple(needs.values())


def _made_by(instruction: Instruction) -> set[int]:
    return {instruction.after} if isinstance(instruction, Alias) else {v.id for op in _calls(instruction) for v in op.outputs}


def _divided(
    prepared: Prepared, instructions: tuple[Instruction, ...], moved: frozenset[int]
) -> tuple[tuple[Instruction, ...], tuple[Instruction, ...]]:
    """What is captured, and the tail, where there can be one."""
    cut = next((k for k, i in enumerate(instructions) if any(reads(op, moved) for op in _calls(i))), len(instructions))
    head, tail, made = list(instructions[:cut]), [], set[int]()
    for i in instructions[cut:]:
        is_view = isinstance(i, Call) and i.op.kind is Kind.VIEW and made.isdisjoint(v.id for v in i.op.inputs)
        if is_view or isinstance(i, Publish):
            # Plans make them as late as they can, and they are part of what the graph returns.
            head.append(i)
        elif not isinstance(i, Drop):
            tail.append(i)
            made |= _made_by(i)
    if all(isinstance(i, (Call, Alias)) or (isinstance(i, StartInGraph) and i.prepared is not None) for i in tail):
        ops = [op for i in tail for op in (i.launch.ops if isinstance(i, StartInGraph) else _calls(i))]
        if may_stay_outside(prepared.plan.graph, ops, prepared.places.root):
            return tuple(head), tuple(tail)
    return instructions, ()


def schedule_work(
    schedule: Schedule,
    table: SlotTable,
    facts: GraphFacts,
    moved: frozenset[int] = frozenset(),
    awaited: tuple[int, ...] = (),
) -> Work:
    """A region's ops one by one; from the first that takes one of the numbers in `moved`, they are the tail if they can be."""
    instructions = schedule.instructions
    cut = next((k for k, i in enumerate(instructions) if reads(i.op, moved)), len(instructions)) if moved else len(instructions)
    rest, tail = [i.op for i in instructions[cut:]], None
    if rest and may_stay_outside(facts.graph, rest, facts.places.root):
        left = replace(schedule, instructions=instructions[cut:])
        schedule = replace(schedule, instructions=instructions[:cut])
        tail = Tail(needs_of(rest), lambda values, scalars: replay(left, values, scalars))
    instructions, nbytes = schedule.instructions, schedule.nbytes
    there = _when_there(awaited, ({v.id for v in i.op.outputs} for i in instructions))
    if there is None or sum(not i.op.starts_nothing for i in instructions[there:]) < WORTH_SENDING:
        return Work(lambda values, scalars, send: replay(schedule, values, scalars), keep=[table], tail=tail, nbytes=nbytes)
    head, then = replace(schedule, instructions=instructions[:there]), replace(schedule, instructions=instructions[there:])

    def run(values: list[Any], scalars: list[float], send: Sending) -> None:
        replay(head, values, scalars)
        send([values[number] for number in awaited])
        replay(then, values, scalars)

    return Work(run, keep=[table], tail=tail, sent=awaited, nbytes=nbytes)
