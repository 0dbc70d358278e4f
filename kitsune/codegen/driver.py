"""Machine code brought to a device and started, by functions of the CUDA driver.

Triton 3.6 starts kernels through a C extension, which it has a C compiler build for each list of parameters: one after the other
in the program's own process, for most of the seconds until BERT's plan could run. Here a start packs its parameters itself.
"""

import contextlib
import ctypes
import struct
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from kitsune.codegen.machine_code import Binary

# The driver's names for what a function may be asked and told.
_MAX_THREADS, _MAX_DYNAMIC_SHARED = 0, 8
# Shared memory that a function may have without being told so.
_PLAIN_SHARED = 48 << 10
# How a buffer with all parameters is announced.
_BUFFER, _SIZE, _END = 1, 2, 0
_Extra = ctypes.c_void_p * 5


class _Attribute(ctypes.Structure):
    """A launch attribute of the driver's: a union of 64 bytes behind its number."""

    _fields_ = (("id", ctypes.c_uint), ("padding", ctypes.c_uint), ("value", ctypes.c_uint), ("rest", ctypes.c_uint * 15))


class _Launch(ctypes.Structure):
    """How a kernel is to be started."""

    _fields_ = (
        *((f"{of}{axis}", ctypes.c_uint) for of in ("grid", "block") for axis in "xyz"),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("n_attributes", ctypes.c_uint),
    )


# Programmatic stream serialization: blocks come to the device as soon as those of the launch before have left it, and wait there
# for what it wrote. That takes 0.3 to 0.5 us a launch off a CUDA graph, after a library's kernel, too (H200, tensors of 8 KiB to
# 64 MiB). Blocks that came before the others have left would keep these from it: 10 to 64 % slower from a million elements on.
_EARLY = (_Attribute * 1)(_Attribute(6, 0, 1))


class LoadedKernel:
    """A kernel on the device of this number. Raises RuntimeError with what the driver says."""

    def __init__(self, binary: Binary, device: int) -> None:
        self._threads = 32 * binary.warps
        with _context_of(device):
            self._function = _loaded(binary, self._threads)
        self._shared, self._waits = binary.shared, binary.early
        # In the order of the parameters each at a multiple of its size, as a C compiler and the driver have it.
        self._layout = struct.Struct("@" + binary.parameters + binary.added)
        self._kinds, self._added = binary.parameters, (0,) * len(binary.added)
        self._memory = ctypes.c_char * self._layout.size
        self._size = ctypes.c_size_t(self._layout.size)

    def launch(self, grid: int, args: Sequence[Any], stream: int, early: bool = True) -> None:
        """Start `grid` blocks on the stream with this handle; `args` as the kernel's signature has them, pointers as numbers.
        `early`, where the kernel allows it: while the launch before it ends."""
        # New memory each time: another thread may be starting it, too. The driver has copied it when the call returns.
        memory = self._memory()
        try:
            self._layout.pack_into(memory, 0, *args, *self._added)
        except OverflowError:
            # A number beyond float32 is infinite there, as in C.
            self._layout.pack_into(memory, 0, *map(_within, args, self._kinds), *self._added)
        extra = _Extra(_BUFFER, ctypes.addressof(memory), _SIZE, ctypes.addressof(self._size), _END)
        how = _Launch(grid, 1, 1, self._threads, 1, 1, self._shared, stream, _EARLY, early and self._waits)
        _call("cuLaunchKernelEx", ctypes.byref(how), self._function, None, extra)


def _loaded(binary: Binary, threads: int) -> ctypes.c_void_p:
    """The function on the current device, ready to be started with so many threads."""
    module, function, most = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_int()
    _call("cuModuleLoadData", ctypes.byref(module), binary.code)
    _call("cuModuleGetFunction", ctypes.byref(function), module, binary.name.encode())
    _call("cuFuncGetAttribute", ctypes.byref(most), _MAX_THREADS, function)
    if threads > most.value:
        raise RuntimeError(f"{binary.name} has blocks of {threads} threads and registers for {most.value}.")
    if binary.shared > _PLAIN_SHARED:
        _call("cuFuncSetAttribute", function, _MAX_DYNAMIC_SHARED, binary.shared)
    # Otherwise a driver that loads lazily does so at the first start, in a step. Those before CUDA 12.4 have no such call.
    with contextlib.suppress(AttributeError):
        _call("cuFuncLoad", function)
    return function


def _within(value: Any, kind: str) -> Any:
    return ctypes.c_float(value).value if kind == "f" else value


# What may take long lets go of Python's lock, which a busy program gives back only after 5 ms; the others keep it.
_LONG = ("cuModuleLoadData", "cuFuncLoad", "cuLaunchKernelEx")


@cache
def _function(name: str) -> Any:
    function = getattr((ctypes.CDLL if name in _LONG else ctypes.PyDLL)("libcuda.so.1"), name)
    if name == "cuLaunchKernelEx":
        function.argtypes = [ctypes.c_void_p] * 4
    return function


def _call(name: str, *args: Any) -> None:
    code = _function(name)(*args)
    if code:
        text = ctypes.c_char_p()
        _function("cuGetErrorString")(code, ctypes.byref(text))
        said = text.value.decode() if text.value else f"error {code}"
        raise RuntimeError(f"{name}: {said}")


@contextlib.contextmanager
def _context_of(device: int) -> Iterator[None]:
    """What is loaded is loaded for the device, whichever is the current one. A thread without a context, as torch leaves it until
    it asks for something, keeps this one."""
    before, context = ctypes.c_void_p(), _primary_context(device)
    _call("cuCtxGetCurrent", ctypes.byref(before))
    _call("cuCtxSetCurrent", context)
    try:
        yield
    finally:
        if before.value:
            _call("cuCtxSetCurrent", before)


@cache
def _primary_context(device: int) -> ctypes.c_void_p:
    """The context that torch works in, too."""
    number, context = ctypes.c_int(), ctypes.c_void_p()
    _call("cuDeviceGet", ctypes.byref(number), device)
    _call("cuDevicePrimaryCtxRetain", ctypes.byref(context), number)
    return context
