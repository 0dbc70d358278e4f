"""The streams that the program uses: memory that it holds is moved behind the work of all of them, and ahead of what comes."""

import contextlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch

# By the device's index and the stream's handle. Those that torch makes are few, and stay.
_used: dict[int, dict[int, torch.cuda.Stream]] = {}
# Of streams that others make, and may take away, what was last known to be under way when the program left them.
_left: dict[int, dict[int, torch.cuda.Event]] = {}


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
    """The program makes, or has made, this stream the current one of its device, or is about to leave it."""
    handle, index = stream.cuda_stream, stream.device_index
    if handle != stream.stream_id or not handle:
        _used.setdefault(index, {}).setdefault(handle, stream)
    elif not torch._C._cuda_isCurrentStreamCapturing():
        wait_for_all(stream.device)
        _left.setdefault(index, {})[handle] = _event_on(stream)


def current(index: int) -> tuple[int, int, int]:
    """The current stream of a device of CUDA's, by its number, the device's, and the kind of device."""
    found: tuple[int, int, int] = torch._C._cuda_getCurrentStream(index)
    return found


def place_of(stream: torch.cuda.Stream) -> tuple[int, int, int]:
    return stream.stream_id, stream.device_index, stream.device_type


def enter(stream: tuple[int, int, int]) -> None:
    """Make it, and its device, the current ones. Torch's own functions for that are doors."""
    number, index, kind = stream
    torch._C._cuda_setStream(stream_id=number, device_index=index, device_type=kind)


def is_captured() -> bool:
    """Does the program, in this thread, capture what it starts on the current stream?"""
    return bool(torch.cuda.is_initialized() and torch._C._cuda_isCurrentStreamCapturing())  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def entered(stream: torch.cuda.Stream) -> Iterator[None]:
    """A stream of Kitsune's own, or one that the program has used before, is the current one."""
    before, device = current(stream.device_index), torch._C._cuda_getDevice()
    try:
        try:  # An interrupt may come as soon as it is the current one.
            enter(place_of(stream))
            yield
        finally:
            enter(before)
    finally:
        torch._C._cuda_setDevice(device)


@contextlib.contextmanager
def on(device: torch.device, handle: int) -> Iterator[None]:
    """The stream with this handle is the current one once more."""
    stream = _used.get(device.index or 0, {}).get(handle)
    if stream is None:
        # One that others may have taken away. What was called on it waits for all.
        wait_for_all(device)
    with contextlib.nullcontext() if stream is None else entered(stream):
        yield


def wait_for_all(device: torch.device) -> None:
    """What comes on the current stream waits for what was started on the others so far.

    While that is being captured, nothing is started on it: it waits for what is captured on others, which is of the same graph,
    and to wait for anything else would end the capture.
    """
    here, others = _current_and_others(device)
    if torch._C._cuda_isCurrentStreamCapturing():
        for other in others:
            if _is_captured(other):
                _wait(here, other)
        return
    for other in others:
        _wait(here, other)
    for event in _left.get(device.index or 0, {}).values():
        torch._C._CudaEventBase.wait(event, here)


@contextlib.contextmanager
def in_order(device: torch.device) -> Iterator[None]:
    """What is started inside, on the current stream, comes behind all that was started and ahead of all that comes on any."""
    # Where one stream is all there is, as in most programs, nothing is asked of the device.
    n = len(_used.get(device.index or 0, ())) + len(_left.get(device.index or 0, ()))
    if n < 2 or device.type != "cuda" or torch._C._cuda_isCurrentStreamCapturing():
        yield
        return
    wait_for_all(device)
    yield
    here, others = _current_and_others(device)
    for other in others:
        _wait(other, here)


def used_by_all(tensor: torch.Tensor) -> None:
    """Whichever stream uses its memory last, whoever gets that next waits for it: the program takes it to be another's."""
    if len(_used.get(tensor.device.index or 0, ())) > 1 and tensor.is_cuda:
        for other in _current_and_others(tensor.device)[1]:
            tensor.record_stream(other)


def _current_and_others(device: torch.device) -> tuple[Any, list[Any]]:
    here = torch.cuda.current_stream(device)
    return here, [stream for handle, stream in _used.get(device.index or 0, {}).items() if handle != here.cuda_stream]


def _is_captured(stream: torch.cuda.Stream) -> bool:
    with entered(stream):
        return torch._C._cuda_isCurrentStreamCapturing()


def _wait(one: torch.cuda.Stream, other: torch.cuda.Stream) -> None:
    torch._C._CudaEventBase.wait(_event_on(other), one)


def _event_on(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    # Not its own method, which is a door.
    torch._C._CudaEventBase.record(event, stream)
    return event
