"""Numbers on their way from the device to the host, in the middle of a captured region."""

from typing import Any

import torch

# For the widest type, complex numbers of two doubles.
N_BYTES = 16


class Letter:
    """Memory of the host for `n` numbers, to be written by a graph. `sent` is to be recorded after each replay of that graph."""

    def __init__(self, n: int) -> None:
        # Allocated before a capture, in which CUDA allows none.
        self._memory = torch.empty((n, N_BYTES), dtype=torch.uint8, pin_memory=True)
        self._numbers: list[torch.Tensor] = []
        self.sent = torch.cuda.Event()

    def write(self, tensors: list[torch.Tensor]) -> None:
        """Have the current stream copy tensors of one element."""
        for row, tensor in zip(self._memory, tensors, strict=True):
            place = row[: tensor.itemsize].view(tensor.dtype).reshape(())
            place.copy_(tensor.reshape(()), non_blocking=True)
            self._numbers.append(place)

    def read(self, k: int) -> Any:
        """Wait for the numbers; returns number k."""
        self.sent.synchronize()
        return torch.ops.aten._local_scalar_dense(self._numbers[k])
