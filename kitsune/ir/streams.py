"""The streams that the program uses: memory that it holds is moved behind the work of all of them, and ahead of what comes."""

import contextlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch

# By the device's index and the stream's handle. Those that torch makes are few, and stay.
_used: dict[int, dict[int, torch.cuda.Stream]] = {}


@cache
def handle_of(device: torch.device) -> Callable[[], int]:
    """What tells the handle of the current stream of a device; 0 where there are none."""
    if device.type != "cuda":
        return int
    index, current = device.index or 0, torch._C._cuda_getCurrentRawStream
    return lambda: current(index)


def current_handle(device: torch.device) -> int:
    return handle_of(device)()


def use(stream: torch.cuda.Stream) -> None:
    """The program makes, or has made, this stream the current one of its device."""
    _used.setdefault(stream.device_index, {}).setdefault(stream.cuda_stream, stream)


def current(index: int) -> tuple[int, int, int]:
    """The current stream of a device of CUDA's, by its number, the device's, and the kind of device."""
    found: tuple[int, int, int] = torch._C._cuda_getCurrentStream(index)
    return found


def enter(stream: tuple[int, int, int]) -> None:
    """Make it the current one. Torch's own functions for that are doors."""
    number, index, kind = stream
    torch._C._cuda_setStream(stream_id=number, device_index=index, device_type=kind)


@contextlib.contextmanager
def on(device: torch.device, handle: int) -> Iterator[None]:
    """A stream that the program has used is the current one once more."""
    index = device.index or 0
    stream, before = _used[index][handle], current(index)
    enter((stream.stream_id, stream.device_index, stream.device_type))
    try:
        yield
    finally:
        enter(before)


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
    return here, [stream for handle, stream in _used.get(device.index or 0, {}).items() if handle != here.cuda_stream]


def _wait(one: torch.cuda.Stream, other: torch.cuda.Stream) -> None:
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    # Not the methods of its own class, which are doors.
    methods: Any = super(torch.cuda.Event, event)
    methods.record(other)
    methods.wait(one)
