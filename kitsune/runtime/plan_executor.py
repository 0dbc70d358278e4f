"""Run plans: kernels and library calls in order, in an arena from the pool; with a way on when a kernel or memory fails."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from kitsune.ir import Launch, Plan, Value, streams
from kitsune.runtime.assembly import Assembly
from kitsune.runtime.branches import Branches
from kitsune.runtime.fallback import tensor_of
from kitsune.runtime.frame import Block, Frame, Layout, Pool, Startable
from kitsune.runtime.instructions import Instruction, Start
from kitsune.runtime.places import Places
from kitsune.runtime.replay import prepare as schedule_of, replay


@dataclass(eq=False, slots=True)
class Prepared:
    """A plan, ready to run. `furnish` are the values in the arena that library calls need as tensors.

    From instruction `first_commit` on a run cannot start again: inputs were written or random numbers drawn. `branches` are the
    streams that its launches have in a CUDA graph, if they are several.
    """

    plan: Plan
    instructions: tuple[Instruction, ...]
    layout: Layout
    places: Places
    furnish: tuple[Value, ...]
    first_commit: int
    device: torch.device
    branches: Branches | None


class PlanExecutor:
    """Runs plans: on the current stream, in the order of the plan's launches; while a CUDA graph captures them, on the streams
    that the plan gives them.

    `prepare_launch(launch)` makes kernels ready to start; `pool` lends arenas; `report(sentence)` hears what went wrong and
    was mended; `relieve` frees what is kept for later runs only, by default the pool's memory and what torch's allocator keeps.
    With `poisons`, runs begin in memory that has no values in it.
    """

    poisons = False

    def __init__(
        self,
        prepare_launch: Callable[[Launch], Startable],
        pool: Pool,
        report: Callable[[str], None],
        relieve: Callable[[], None] | None = None,
    ) -> None:
        self.prepare_launch, self.pool, self.report = prepare_launch, pool, report
        self.relieve = relieve or self._free_pool
        # Texts, or names, of programs that could not be started.
        self.broken: set[str] = set()

    def prepare(self, plan: Plan) -> Prepared:
        """Decide everything about a plan that does not depend on the run. Kernels that cannot be had are reported."""
        places = Places(plan.graph)
        assembly = Assembly(plan, places, lambda launch: self._start(launch, places))
        instructions = tuple(assembly.instructions)
        device, several = _device_of(plan), any(launch.stream for launch in plan.launches)
        commits = [k for k, instruction in enumerate(instructions) if instruction.commits]
        return Prepared(
            plan=plan,
            instructions=instructions,
            layout=assembly.layout(),
            places=places,
            furnish=tuple(assembly.furnish.values()),
            first_commit=commits[0] if commits else len(instructions),
            device=device,
            branches=Branches(plan.launches, device) if several and device.type == "cuda" else None,
        )

    def run(self, prepared: Prepared, values: list[Any], scalars: list[float]) -> None:
        """Run a plan. `values` holds the inputs by value number and receives the outputs, also those before a failure.

        Raises what an operator raises, with the user's line, and torch.OutOfMemoryError if there is not enough memory even
        for running the operators one by one.
        """
        previous = _enter_device(prepared.device)
        try:
            if not self._run_planned(prepared, values, scalars):
                self._run_again(prepared, values, scalars)
        finally:
            _enter_device(previous)

    def trace(self, prepared: Prepared, block: Block | None, values: list[Any], scalars: list[float]) -> Frame:
        """Go through a plan once, in an arena that is given, with no way on if anything fails: what a CUDA graph captures.

        Returns what the run has left.
        """
        frame = Frame(prepared.layout, values, scalars, streams.current_handle(prepared.device))
        if prepared.layout.arena:
            assert block is not None
            frame.move_in(block)
            frame.furnish(prepared, lambda frame: _furnish(prepared, frame))
        if prepared.branches is None:
            _execute(prepared.instructions, frame, 0)
        else:
            prepared.branches.run(prepared.instructions, frame)
        return frame

    def _run_planned(self, prepared: Prepared, values: list[Any], scalars: list[float]) -> bool:
        """False if there is not enough memory for the arena or with it, and nothing was done yet that others could see."""
        frame = Frame(prepared.layout, values, scalars, streams.current_handle(prepared.device), self.poisons)
        try:
            if not self._move_in(prepared, frame):
                return False
            if _attempt(prepared, frame):
                return True
            if frame.position <= prepared.first_commit:
                return False
            # Something was done that must not be done twice: on from here. What the arena holds is needed.
            self.relieve()
            frame.find_inputs()
            _execute(prepared.instructions, frame, frame.position)
            return True
        finally:
            if frame.block is not None:
                self.pool.give(frame.block)

    def _move_in(self, prepared: Prepared, frame: Frame) -> bool:
        # Also for an arena of no bytes, if there are values without elements in it.
        for attempt in range(2 if prepared.layout.arena else 0):
            try:
                frame.move_in(self.pool.take(prepared.plan.arena, prepared.device, frame.stream))
            except torch.OutOfMemoryError:
                pass
            else:
                frame.furnish(prepared, lambda frame: _furnish(prepared, frame))
                return True
            if not attempt:
                self.relieve()
                frame.find_inputs()
        return not prepared.layout.arena

    def _run_again(self, prepared: Prepared, values: list[Any], scalars: list[float]) -> None:
        inputs = prepared.places.inputs
        for number in range(len(values)):
            if number not in inputs:
                values[number] = None
        self.relieve()
        self.report(
            f"Memory ran out in a region of {len(prepared.plan.graph.ops)} operators; they were run one by one instead, without "
            "an arena. A smaller batch leaves room for it."
        )
        replay(schedule_of(prepared.plan.graph), values, scalars)

    def _free_pool(self) -> None:
        self.pool.free_all()
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def _start(self, launch: Launch, places: Places) -> Start:
        prepared = None
        try:
            prepared = self.prepare_launch(launch)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self._give_up(launch, None, error)
        return Start(launch, places, prepared, program_of(prepared), self.broken, self._give_up, self.relieve)

    def _give_up(self, launch: Launch, prepared: Startable | None, error: Exception) -> None:
        program = program_of(prepared)
        if program in self.broken:
            return
        if program is not None:
            self.broken.add(program)
        reason = getattr(error, "reason", None) or f"{type(error).__name__}: {error}"
        path = getattr(error, "path", None)
        source = f" Its source is {path}." if path else ""
        self.report(
            f"The kernel {launch.name} cannot be used, so its {len(launch.ops)} operators are run one by one. {reason}{source}"
        )


def _execute(instructions: tuple[Instruction, ...], frame: Frame, start: int) -> None:
    for position in range(start, len(instructions)):
        frame.position = position
        instructions[position].run(frame)


def _attempt(prepared: Prepared, frame: Frame) -> bool:
    """Run everything; False if memory has run out in an instruction that may be tried again."""
    try:
        _execute(prepared.instructions, frame, 0)
    except torch.OutOfMemoryError:
        if frame.partial or not prepared.instructions[frame.position].repeats:
            raise
        return False
    return True


def program_of(prepared: Startable | None) -> str | None:
    """What tells a launch's program from others, if anything does."""
    text = getattr(getattr(prepared, "program", None), "text", None)
    return text or getattr(prepared, "name", None)


def _furnish(prepared: Prepared, frame: Frame) -> dict[int, torch.Tensor]:
    return {value.id: tensor_of(value, prepared.places, frame) for value in prepared.furnish}


def _device_of(plan: Plan) -> torch.device:
    made = [v.type.device for op in plan.graph.ops for v in op.outputs]
    return next((device for device in made if device.type != "cpu"), torch.device("cpu"))


def _enter_device(device: torch.device) -> torch.device:
    """Make a device the current one; returns the one before."""
    if device.type != "cuda":
        return device
    return torch.device("cuda", torch.cuda._exchange_device(device.index))
