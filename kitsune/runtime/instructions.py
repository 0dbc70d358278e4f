"""What a run of a plan consists of. Everything that does not depend on the run was decided when these were made."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._ops import OpOverload

from kitsune.ir import Launch, Op, Pending, TensorType
from kitsune.runtime.calls import call, call_into
from kitsune.runtime.fallback import may_have_begun, run_by_ops
from kitsune.runtime.frame import Frame, Startable, data_ptr, poison, unfilled
from kitsune.runtime.places import Places


@dataclass(eq=False, slots=True)
class Instruction:
    """One step of a run. `commits`: once it has been run, the region cannot be run again from the start.

    `repeats`: it can be run again after it ran out of memory. `at` is the number of the plan's launch that it belongs to.
    """

    commits: bool = field(default=False, kw_only=True)
    repeats: bool = field(default=True, kw_only=True)
    at: int = field(default=-1, kw_only=True)

    def run(self, frame: Frame) -> None:
        """Do it."""
        raise NotImplementedError


@dataclass(eq=False, slots=True)
class Allocate(Instruction):
    """New memory for a root value, of which `slot` gets the address."""

    number: int
    slot: int
    type: TensorType

    def run(self, frame: Frame) -> None:
        """Raises torch.OutOfMemoryError."""
        tensor = unfilled(self.type)
        frame.memory[self.number] = tensor
        frame.bases[self.slot] = data_ptr(tensor)
        if frame.poisoned:
            poison(tensor)


@dataclass(eq=False, slots=True)
class Start(Instruction):
    """Start a launch's kernels, or run its ops one by one where `prepared` is None or turns out not to work."""

    launch: Launch
    places: Places
    prepared: Startable | None
    # What the kernels' program is known by, and the programs that were given up, maybe for another launch.
    program: str | None
    broken: set[str]
    # Hears of an exception: the kernels are not tried again.
    give_up: Callable[[Launch, Startable | None, Exception], None]
    relieve: Callable[[], None]

    def run(self, frame: Frame) -> None:
        """Raises torch.OutOfMemoryError, and what the ops raise."""
        prepared = self.prepared
        if prepared is not None and self.program not in self.broken:
            try:
                return prepared.start(frame.address, frame.scalars, frame.stream)
            except torch.OutOfMemoryError:
                raise
            except Pending:
                return run_by_ops(self.launch, self.places, frame, self.relieve)
            except Exception as error:
                self.give_up(self.launch, prepared, error)
        self.prepared = None
        run_by_ops(self.launch, self.places, frame, self.relieve)


@dataclass(eq=False, slots=True)
class StartInGraph(Instruction):
    """The same while a CUDA graph is captured. A kernel that does not start ends the capture."""

    launch: Launch
    places: Places
    prepared: Startable | None

    def run(self, frame: Frame) -> None:
        """Raises what the kernels and the ops raise."""
        if self.prepared is None:
            run_by_ops(self.launch, self.places, frame, lambda: None)
        else:
            self.prepared.start(frame.address, frame.scalars, frame.stream)


@dataclass(eq=False, slots=True)
class Call(Instruction):
    """A library call or a view; (number, slot) of results whose addresses kernels need."""

    op: Op
    addresses: tuple[tuple[int, int], ...] = ()

    def run(self, frame: Frame) -> None:
        """Raises what the op raises, with the user's line."""
        call(self.op, frame.values, frame.scalars)
        for number, slot in self.addresses:
            frame.bases[slot] = data_ptr(frame.values[number])


@dataclass(eq=False, slots=True)
class CallInto(Instruction):
    """A library call that computes into memory of ours."""

    op: Op
    form: OpOverload
    names: tuple[str, ...]

    def run(self, frame: Frame) -> None:
        """Raises what the op raises, with the user's line."""
        memory = [frame.memory_of(value.id) for value in self.op.results]
        call_into(self.op, self.form, self.names, memory, frame.values, frame.scalars)


@dataclass(eq=False, slots=True)
class Publish(Instruction):
    """The memory of a root value has been filled."""

    number: int

    def run(self, frame: Frame) -> None:
        """Never fails."""
        frame.values[self.number] = frame.memory[self.number]


@dataclass(eq=False, slots=True)
class Alias(Instruction):
    """A value is, after a write, the same tensor as before."""

    after: int
    before: int

    def run(self, frame: Frame) -> None:
        """Never fails."""
        frame.values[self.after] = frame.values[self.before]


@dataclass(eq=False, slots=True)
class Send(Instruction):
    """Values that the program waits for are there: their numbers can be read while the rest is done."""

    numbers: tuple[int, ...]
    send: Callable[[list[torch.Tensor]], None]

    def run(self, frame: Frame) -> None:
        """Raises what `send` raises."""
        self.send([frame.values[number] for number in self.numbers])


@dataclass(eq=False, slots=True)
class Drop(Instruction):
    """Let go of tensors."""

    numbers: tuple[int, ...]

    def run(self, frame: Frame) -> None:
        """Never fails."""
        values, memory = frame.values, frame.memory
        for number in self.numbers:
            values[number] = None
            memory.pop(number, None)


def library_call(op: Op, inputs: set[int], **kwargs: Any) -> Call | CallInto:
    """The instruction for a library call; `inputs` are the storages that come from outside."""
    commits = op.effects.random or not inputs.isdisjoint(op.effects.writes)
    kind = CallInto if "form" in kwargs else Call
    return kind(op, **kwargs, commits=commits, repeats=not may_have_begun(op))
