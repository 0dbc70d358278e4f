"""Numbers on their way from the device to the host, in the middle of a captured region."""

from typing import Any

import torch

# For the widest type, complex numbers of two doubles.
N_BYTES = 16
# Not the method, which is a door; and the overload, which need not be looked for.
_number_of = torch.ops.aten._local_scalar_dense.default


class Letter:
    """Memory of the host for `n` numbers, to be written by a graph. After each replay of that graph `mark` is to be called."""

    def __init__(self, n: int, device: torch.device) -> None:
        self._device = device
        # Allocated before a capture, in which CUDA allows none.
        self._memory = torch.empty((n, N_BYTES), dtype=torch.uint8, pin_memory=True)
        self._numbers: list[torch.Tensor] = []
        self._sent = torch.cuda.Event()

    def write(self, tensors: list[torch.Tensor]) -> None:
        """Have the stream that captures copy tensors of one element."""
        for row, tensor in zip(self._memory, tensors, strict=True):
            place = row[: tensor.itemsize].view(tensor.dtype).reshape(())
            place.copy_(tensor.reshape(()), non_blocking=True)
            self._numbers.append(place)

    def mark(self) -> None:
        """What the device's current stream has been given so far writes the numbers."""
        # Not the methods of torch.cuda.Event, which are doors: a wait of the program's would end the region.
        torch._C._CudaEventBase.record(self._sent, torch.cuda.current_stream(self._device))

    def read(self, k: int) -> Any:
        """Wait for the numbers; returns number k."""
        torch._C._CudaEventBase.synchronize(self._sent)
        return _number_of(self._numbers[k])
