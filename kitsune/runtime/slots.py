"""Moving numbers under a captured graph: kernels read them from a table; one that was read on the host is baked in."""

from array import array
from collections.abc import Iterable, Sequence
from ctypes import string_at

import torch

# Not the method, which is a door.
_pinned = torch._C.TensorBase.pin_memory


def bits_of(numbers: Iterable[float]) -> bytes:
    """Tells numbers apart as kernels do: 0.0 from -0.0, and not NaN from itself."""
    return array("d", numbers).tobytes()


def host_bits(tensor: torch.Tensor) -> bytes:
    """The same of a tensor without dimensions on the host."""
    return string_at(torch._C.TensorBase.data_ptr(tensor), tensor.itemsize)


def changed(before: bytes, now: bytes) -> set[int]:
    """The numbers that are others than before, given the bits of both."""
    return {n for n in range(len(now) // 8) if before[8 * n : 8 * n + 8] != now[8 * n : 8 * n + 8]}


class SlotTable:
    """The first `n` moving numbers of a region as float64 in the memory of a device."""

    def __init__(self, n: int, device: torch.device) -> None:
        self.n = n
        self.memory = torch.zeros(max(n, 1), dtype=torch.float64, device=device)
        self.address: int = torch._C.TensorBase.data_ptr(self.memory)
        self._bits = b""
        # What was set last, where it cannot have become something else.
        self._numbers: Sequence[float] | None = None

    def set(self, numbers: Sequence[float]) -> None:
        """Bring the table up to date on the current stream: one small copy, and none if nothing has changed.

        A run that has diverged may have more numbers behind those of its region, or had them when the table was made.
        """
        if numbers is self._numbers:
            return
        bits = bits_of(numbers[: self.n])
        self._numbers = None
        if bits and bits != self._bits:
            self._copy(bits)
        self._numbers = numbers if type(numbers) is tuple else None

    def _copy(self, bits: bytes) -> None:
        host = torch.frombuffer(bytearray(bits), dtype=torch.float64)
        if self.memory.device.type == "cuda":
            # Fresh pinned memory each time: an earlier copy may not have run yet. torch uses it again once it has.
            host = _pinned(host)
        memory = self.memory if len(host) == len(self.memory) else self.memory[: len(host)]
        memory.copy_(host, non_blocking=True)
        self._bits = bits


class WatchedNumbers(list[float]):
    """The moving numbers of the run that is captured; `read` are those that the host has looked at."""

    def __init__(self, numbers: Iterable[float]) -> None:
        super().__init__(numbers)
        self.read: set[int] = set()

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        self.read.add(index)
        return super().__getitem__(index)
