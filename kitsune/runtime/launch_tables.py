"""What a batched launch reads from memory: a row of parameters for each kernel, and the number of the kernel of each block."""

from collections.abc import Sequence

import torch

# Not the method, which is a door.
_pinned = torch._C.TensorBase.pin_memory


def owners_of(sizes: Sequence[int], block: int) -> torch.Tensor:
    """For each block the number of its kernel."""
    counts = torch.tensor([-(-n // block) for n in sizes])
    return torch.repeat_interleave(torch.arange(len(sizes), dtype=torch.int32), counts)


def complete_rows(rows: list[list[int]], sizes: Sequence[int], block: int) -> torch.Tensor:
    """The rows with the number of each kernel's first block at their end."""
    first, complete = 0, []
    for row, n in zip(rows, sizes, strict=True):
        complete.append([*row, first])
        first += -(-n // block)
    return torch.tensor(complete, dtype=torch.int64)


class Tables:
    """What a batch reads from memory: its parameters by kernel, and the kernel of each block. Kept while they do not change, by
    the stream on which it was written: on another one it might not be there yet."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # On the host, by the elements of a block; and on the device, by these and by stream.
        self._owners: dict[int, torch.Tensor] = {}
        self._blocks: dict[tuple[int, int], tuple[int, torch.Tensor]] = {}
        # The rows and the table with them.
        self._tables: dict[int, tuple[list[list[int]], torch.Tensor]] = {}

    def prepare(self, sizes: Sequence[int], block: int) -> torch.Tensor:
        """For each block the number of its kernel, on the host, from where it can be copied while the device is busy."""
        owners = self._owners.get(block)
        if owners is None:
            owners = self._owners[block] = self._on_host(owners_of(sizes, block))
        return owners

    def blocks(self, sizes: Sequence[int], block: int, stream: int) -> tuple[int, torch.Tensor]:
        """The number of blocks, and for each the number of its kernel, for a launch on the current stream, whose handle is
        `stream`. The host does not wait: the device may have a step or two to do before it comes to this copy."""
        known = self._blocks.get((block, stream))
        if known is None:
            owners = self.prepare(sizes, block)
            known = self._blocks[block, stream] = owners.numel(), owners.to(self._device, non_blocking=True)
        return known

    def table(self, rows: list[list[int]], sizes: Sequence[int], block: int, stream: int) -> torch.Tensor:
        """The rows in memory that kernels on the stream can read."""
        known = self._tables.get(stream)
        if known is not None and known[0] == rows:
            return known[1]
        table = self._on_device(complete_rows(rows, sizes, block))
        self._tables[stream] = (rows, table)
        return table

    def reserve(self, sizes: Sequence[int], n_columns: int, block: int) -> None:
        """Make memory ahead of a capture."""

    def fill(self) -> None:
        """Write what was put off until the end of a capture."""

    def _on_device(self, host: torch.Tensor) -> torch.Tensor:
        # On the current stream, where the launch goes as well. It cannot be named by its handle: torch takes the handle 0 of the
        # default stream for a wish for a new one.
        return self._on_host(host).to(self._device, non_blocking=True)

    def _on_host(self, host: torch.Tensor) -> torch.Tensor:
        """Pinned, so that who copies it to a device does not wait for that."""
        return _pinned(host) if self._device.type == "cuda" else host


class LaterTables(Tables):
    """Tables of a launch that a CUDA graph captures: memory before the capture, what lies there when it is over.

    A copy from the host that is captured would be made again by every replay, and memory from inside the capture was another
    tensor's before, which every replay writes again.
    """

    def __init__(self, device: torch.device, ordinary: Tables) -> None:
        super().__init__(device)
        self._owners = ordinary._owners
        # By the elements of a block.
        self._owned: dict[int, torch.Tensor] = {}
        self._memory: torch.Tensor | None = None
        self._rows: torch.Tensor | None = None

    def reserve(self, sizes: Sequence[int], n_columns: int, block: int) -> None:
        """Make memory for a row of `n_columns` parameters for each kernel, and for the kernels of the blocks."""
        self._owned[block] = torch.empty(self.prepare(sizes, block).shape, dtype=torch.int32, device=self._device)
        self._memory = torch.empty((len(sizes), n_columns + 1), dtype=torch.int64, device=self._device)

    def blocks(self, sizes: Sequence[int], block: int, stream: int) -> tuple[int, torch.Tensor]:
        """The memory that will hold them."""
        owned = self._owned[block]
        return owned.numel(), owned

    def table(self, rows: list[list[int]], sizes: Sequence[int], block: int, stream: int) -> torch.Tensor:
        """The memory that will hold the rows."""
        assert self._memory is not None
        self._rows = complete_rows(rows, sizes, block)
        return self._memory

    def fill(self) -> None:
        """Write the rows and the kernels of the blocks, on the current stream."""
        if self._memory is not None and self._rows is not None:
            self._memory.copy_(self._on_host(self._rows), non_blocking=True)
            for block, owned in self._owned.items():
                owned.copy_(self._owners[block], non_blocking=True)
