"""A plan's launches on its several streams, while a CUDA graph captures them: they become branches of the graph."""

import contextlib
from collections.abc import Iterator, Sequence

import torch

from kitsune.ir import Launch, awaited, meetings
from kitsune.ir.streams import enter, place_of
from kitsune.runtime.frame import Frame
from kitsune.runtime.instructions import Allocate, Call, CallInto, Drop, Instruction, Send, Start, StartInGraph

# By device: streams from torch's pool, which has 32 of them, taken once.
_side_streams: dict[int, list[torch.cuda.Stream]] = {}


class Branches:
    """The streams of a plan: 0 is the one that captures, the others fork from it and join it at the end.

    All memory is allocated on stream 0, but for what library calls allocate themselves. It is allocated and let go of when the
    streams have met, so that no stream can be given memory that another one still uses.
    """

    def __init__(self, launches: Sequence[Launch], device: torch.device) -> None:
        self._launches, self._device = launches, device
        self._n_sides = max(launch.stream for launch in launches)
        self._waits = awaited(launches)
        self._awaited = {n for launch, waits in zip(launches, self._waits, strict=True) if not launch.is_empty for n in waits}
        self._met = meetings(launches)

    def make_streams(self) -> None:
        """To be called ahead of a capture, which has to know them."""
        _sides(self._device, self._n_sides)

    def run(self, instructions: Sequence[Instruction], frame: Frame) -> None:
        """Raises what the instructions raise, with the streams joined."""
        main = torch.cuda.current_stream(self._device)
        streams = [main, *_sides(self._device, self._n_sides)]
        done: dict[int, torch.cuda.Event] = {}
        dropped: list[Instruction] = []
        _fork(streams)
        try:
            for together in self._between_meetings(instructions):
                if isinstance(together[0], Send):
                    # Here the capture ends and the next begins: no event of the one means anything in the other.
                    _join(streams)
                    done.clear()
                _run_all(dropped, frame)
                # Memory for all of them first. What a library call needs for itself goes back to torch as soon as it has been
                # called, to whoever asks next: that may be a kernel of another stream, which runs at the same time.
                _run_all([i for i in together if isinstance(i, Allocate)], frame)
                for instruction in together:
                    if isinstance(instruction, Drop):
                        dropped.append(instruction)
                    elif reaches_device(instruction):
                        self._launch(instruction, frame, streams, done)
                    elif not isinstance(instruction, Allocate):
                        instruction.run(frame)
                if isinstance(together[0], Send):
                    _fork(streams)
        finally:
            _join(streams)
        _run_all(dropped, frame)

    def _between_meetings(self, instructions: Sequence[Instruction]) -> Iterator[list[Instruction]]:
        """The instructions in order, from each launch that waits for all before it to the next one; a Send waits, too, and is by
        itself."""
        together: list[Instruction] = []
        at = -1
        for instruction in instructions:
            sends = isinstance(instruction, Send)
            if together and (sends or isinstance(together[0], Send) or (instruction.at != at and instruction.at in self._met)):
                yield together
                together = []
            at = at if sends else instruction.at
            together.append(instruction)
        if together:
            yield together

    def _launch(
        self, instruction: Instruction, frame: Frame, streams: list[torch.cuda.Stream], done: dict[int, torch.cuda.Event]
    ) -> None:
        number = instruction.at
        side = self._launches[number].stream
        stream = streams[side]
        for n in self._waits[number]:
            # What came before a Send has no event any more: there the streams have met.
            if n in done:
                stream.wait_event(done[n])
        if side:
            with _on(stream, streams[0], frame):
                instruction.run(frame)
        else:
            instruction.run(frame)
        if number in self._awaited:
            done[number] = stream.record_event()


def _fork(streams: list[torch.cuda.Stream]) -> None:
    for side in streams[1:]:
        side.wait_stream(streams[0])


def _join(streams: list[torch.cuda.Stream]) -> None:
    for side in streams[1:]:
        streams[0].wait_stream(side)


def _run_all(instructions: list[Instruction], frame: Frame) -> None:
    for instruction in instructions:
        instruction.run(frame)
    instructions.clear()


def reaches_device(instruction: Instruction) -> bool:
    """Does it put work on a stream?"""
    if isinstance(instruction, Call):
        return not instruction.op.starts_nothing
    return isinstance(instruction, (CallInto, Start, StartInGraph))


@contextlib.contextmanager
def _on(stream: torch.cuda.Stream, main: torch.cuda.Stream, frame: Frame) -> Iterator[None]:
    """With a side stream as the current one. (torch's own context asks for the stream before each time, and goes by a door.)"""
    before, frame.stream = frame.stream, stream.cuda_stream
    enter(place_of(stream))
    try:
        yield
    finally:
        enter(place_of(main))
        frame.stream = before


def of_products(device: torch.device) -> list[torch.cuda.Stream]:
    """Streams beside the main one that plans may have matrix products on: they stay on two."""
    return _side_streams.get(device.index or 0, [])[:1]


def _sides(device: torch.device, n: int) -> list[torch.cuda.Stream]:
    known = _side_streams.setdefault(device.index or 0, [])
    while len(known) < n:
        known.append(torch.cuda.Stream(device))
    return known[:n]
