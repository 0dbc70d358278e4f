"""Bytes copied from one address to another on the current stream, past torch's dispatcher.

For a graph that reads no pages: a replay copies its batch in, and perhaps a loss out, a few bytes each, at 6 us of `copy_` on the
host of an H200.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

# From the addresses and a number of bytes: has it been done? Where not, nothing has happened, and `copy_` says what is wrong.
RawCopy = Callable[[int, int, int], bool]


# Worked out once: a graph has hundreds of results.
@cache
def raw_copy(device: torch.device) -> RawCopy:
    """Copies within the memory of one device."""
    if device.type == "cpu":
        return _move
    copy = _of_driver()
    if copy is None:
        return _cannot
    index, current, stream = device.index or 0, torch._C._cuda_getDevice, torch._C._cuda_getCurrentRawStream  # type: ignore[attr-defined]

    def on_device(to: int, source: int, nbytes: int) -> bool:
        # In the context of another device, stream 0 is that one's; a thread without a context is told so by the driver.
        return current() == index and copy(to, source, nbytes, stream(index)) == 0

    return on_device


def _of_driver() -> Any:
    """The driver's function; None where there is none."""
    try:
        # It lets go of the GIL: the driver may wait for room in its queue.
        copy = ctypes.CDLL("libcuda.so.1").cuMemcpyDtoDAsync_v2
    except (OSError, AttributeError):
        return None
    copy.argtypes, copy.restype = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p], ctypes.c_int
    return copy


def _move(to: int, source: int, nbytes: int) -> bool:
    ctypes.memmove(to, source, nbytes)
    return True


def _cannot(to: int, source: int, nbytes: int) -> bool:
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
