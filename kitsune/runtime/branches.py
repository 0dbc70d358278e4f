"""A plan's launches on its several streams, while a CUDA graph captures them: they become branches of the graph."""

import contextlib
from collections.abc import Iterator, Sequence

import torch

from kitsune.ir import Launch, happens_before
from kitsune.runtime.frame import Frame
from kitsune.runtime.instructions import Allocate, Call, CallInto, Drop, Instruction, Start, StartInGraph

# By device: streams from torch's pool, which has 32 of them, taken once.
_side_streams: dict[int, list[torch.cuda.Stream]] = {}


class Branches:
    """The streams of a plan: 0 is the one that captures, the others fork from it and join it at the end.

    All memory is allocated on stream 0, but for what library calls allocate themselves. It is allocated and let go of when the
    streams have met, so that no stream can be given memory that another one still uses.
    """

    def __init__(self, launches: Sequence[Launch], device: torch.device) -> None:
        self._launches, self._device = launches, device
        self._awaited = {n for launch in launches for n in launch.waits}
        on_device, self._met = 0, set[int]()
        for k, before in enumerate(happens_before(launches)):
            if not launches[k].host_only:
                if not on_device & ~before:
                    self._met.add(k)
                on_device |= 1 << k

    def run(self, instructions: Sequence[Instruction], frame: Frame) -> None:
        """Raises what the instructions raise, with the streams joined."""
        main = torch.cuda.current_stream(self._device)
        streams = [main, *_sides(self._device, max(launch.stream for launch in self._launches))]
        done: dict[int, torch.cuda.Event] = {}
        dropped: list[Instruction] = []
        for side in streams[1:]:
            side.wait_stream(main)
        try:
            for together in self._between_meetings(instructions):
                _run_all(dropped, frame)
                # Memory for all of them first. What a library call needs for itself goes back to torch as soon as it has been
                # called, to whoever asks next: that may be a kernel of another stream, which runs at the same time.
                _run_all([i for i in together if isinstance(i, Allocate)], frame)
                for instruction in together:
                    if isinstance(instruction, Drop):
                        dropped.append(instruction)
                    elif _reaches_device(instruction):
                        self._launch(instruction, frame, streams, done)
                    elif not isinstance(instruction, Allocate):
                        instruction.run(frame)
        finally:
            for side in streams[1:]:
                main.wait_stream(side)
        _run_all(dropped, frame)

    def _between_meetings(self, instructions: Sequence[Instruction]) -> Iterator[list[Instruction]]:
        """The instructions in order, from each launch that waits for all before it to the next one."""
        together: list[Instruction] = []
        at = -1
        for instruction in instructions:
            if instruction.at != at and instruction.at in self._met:
                yield together
                together = []
            at = instruction.at
            together.append(instruction)
        yield together

    def _launch(
        self, instruction: Instruction, frame: Frame, streams: list[torch.cuda.Stream], done: dict[int, torch.cuda.Event]
    ) -> None:
        number = instruction.at
        launch = self._launches[number]
        stream = streams[launch.stream]
        for n in launch.waits:
            # A launch over no elements was not made: then all that its stream has been given so far.
            event = done.get(n) or streams[self._launches[n].stream].record_event()
            stream.wait_event(event)
        with _on(stream, frame) if launch.stream else contextlib.nullcontext():
            instruction.run(frame)
        if number in self._awaited:
            done[number] = stream.record_event()


def _run_all(instructions: list[Instruction], frame: Frame) -> None:
    for instruction in instructions:
        instruction.run(frame)
    instructions.clear()


def _reaches_device(instruction: Instruction) -> bool:
    if isinstance(instruction, Call):
        return not instruction.op.starts_nothing
    return isinstance(instruction, (CallInto, Start, StartInGraph))


@contextlib.contextmanager
def _on(stream: torch.cuda.Stream, frame: Frame) -> Iterator[None]:
    before, frame.stream = frame.stream, stream.cuda_stream
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        frame.stream = before


def _sides(device: torch.device, n: int) -> list[torch.cuda.Stream]:
    known = _side_streams.setdefault(device.index or 0, [])
    while len(known) < n:
        known.append(torch.cuda.Stream(device))
    return known[:n]
