"""The streams that the program uses: memory that it holds is moved behind the work of all of them, and ahead of what comes."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

# By the device's index and the stream's number. Those that torch makes are few, and stay.
_used: dict[int, dict[int, torch.cuda.Stream]] = {}


def use(stream: torch.cuda.Stream) -> None:
    """The program makes, or has made, this stream the current one of its device."""
    _used.setdefault(stream.device_index, {}).setdefault(stream.stream_id, stream)


def wait_for_all(device: torch.device) -> None:
    """What comes on the current stream waits for what was started on the others so far."""
    here, others = _current_and_others(device)
    for other in others:
        _wait(here, other)


@contextlib.contextmanager
def in_order(device: torch.device) -> Iterator[None]:
    """What is started inside, on the current stream, comes behind all that was started and ahead of all that comes on any."""
    # Where one stream is all there is, as in most programs, nothing is asked of the device.
    if len(_used.get(device.index or 0, ())) < 2 or device.type != "cuda" or torch._C._cuda_isCurrentStreamCapturing():
        yield
        return
    here, others = _current_and_others(device)
    for other in others:
        _wait(here, other)
    yield
    for other in others:
        _wait(other, here)


def _current_and_others(device: torch.device) -> tuple[Any, list[Any]]:
    here = torch.cuda.current_stream(device)
    return here, [stream for number, stream in _used.get(device.index or 0, {}).items() if number != here.stream_id]


def _wait(one: torch.cuda.Stream, other: torch.cuda.Stream) -> None:
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    # Not the methods of its own class, which are doors.
    methods: Any = super(torch.cuda.Event, event)
    methods.record(other)
    methods.wait(one)
