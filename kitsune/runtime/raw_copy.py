"""Bytes copied or written on the current stream, past torch's dispatcher.

A replay copies its batch in, and perhaps a loss out: a few bytes each, at 6 us of `copy_` on the host of an H200. A number that
the host has, such as a learning rate, is written there: to pin memory for it and copy that was 15 % of a step.
"""

import ctypes
import sys
from collections.abc import Callable
from typing import Any

import torch

# From the addresses and a number of bytes: has it been done? Where not, nothing has happened, and `copy_` says what is wrong.
RawCopy = Callable[[int, int, int], bool]
# From an address and what is to stand there, a multiple of 4 bytes.
RawWrite = Callable[[int, bytes], bool]


def raw_copy(device: torch.device) -> RawCopy:
    """Copies within the memory of one device."""
    if device.type == "cpu":
        return _move
    copy = _in_driver("cuMemcpyDtoDAsync_v2", [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p])
    if copy is None:
        return _cannot
    index, current, stream = device.index or 0, torch._C._cuda_getDevice, torch._C._cuda_getCurrentRawStream  # type: ignore[attr-defined]

    def on_device(to: int, source: int, nbytes: int) -> bool:
        # In the context of another device, stream 0 is that one's; a thread without a context is told so by the driver.
        return current() == index and copy(to, source, nbytes, stream(index)) == 0

    return on_device


def raw_write(device: torch.device) -> RawWrite:
    """Writes into the memory of a device. What is written goes along with the call: nothing on the host has to stay as it is."""
    if device.type == "cpu":
        return _put
    fill = _in_driver("cuMemsetD32Async", [ctypes.c_uint64, ctypes.c_uint, ctypes.c_size_t, ctypes.c_void_p])
    if fill is None:
        return _cannot
    index, current, stream = device.index or 0, torch._C._cuda_getDevice, torch._C._cuda_getCurrentRawStream  # type: ignore[attr-defined]

    def on_device(to: int, content: bytes) -> bool:
        words = [(k, int.from_bytes(content[k : k + 4], sys.byteorder)) for k in range(0, len(content), 4)]
        return current() == index and all(fill(to + k, word, 1, stream(index)) == 0 for k, word in words)

    return on_device


def _in_driver(name: str, takes: list[Any]) -> Any:
    """A function of the driver. It lets go of the GIL: the driver may wait for room in its queue."""
    try:
        function = getattr(ctypes.CDLL("libcuda.so.1"), name)
    except (OSError, AttributeError):
        return None
    function.argtypes, function.restype = takes, ctypes.c_int
    return function


def _move(to: int, source: int, nbytes: int) -> bool:
    ctypes.memmove(to, source, nbytes)
    return True


def _put(to: int, content: bytes) -> bool:
    ctypes.memmove(to, content, len(content))
    return True


def _cannot(*_: Any) -> bool:
    return False


def is_solid(tensor: torch.Tensor) -> bool:
    """Are its elements all the bytes from its address on, each once? Then so are those of any tensor of the same strides."""
    reach = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != reach:
                return False
            reach *= size
    return tensor.numel() > 0
