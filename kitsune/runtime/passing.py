"""What goes into a captured graph and out of it by another address each time, and how it gets there."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from kitsune.ir.page import N_COPIES
from kitsune.runtime.capturable import distinct
from kitsune.runtime.page_reader import PageReader
from kitsune.runtime.page_ring import PageRing
from kitsune.runtime.raw_copy import is_solid, raw_copy
from kitsune.runtime.slots import SlotTable

_data_ptr = torch._C.TensorBase.data_ptr


class Passing:
    """What passes in: the tensors that the graph reads instead of inputs, `places` by the numbers of these, and its table of
    moving numbers. And out: copies of small results.

    With a `reader` the graph itself begins with copying what fills its bytes, and ends with copying results: each replay is told
    from where and to where. Without, the driver copies before the graph starts, one by one. What has gaps is left to torch.
    """

    def __init__(self, places: Mapping[int, torch.Tensor], table: SlotTable, reader: PageReader | None) -> None:
        self._table = table
        # Each element once, so that a copy writes none twice.
        targets = {n: distinct(place) for n, place in places.items()}
        solid = [n for n, t in targets.items() if t is places[n] and is_solid(t) and t.device == table.memory.device]
        self._odd = [(n, t) for n, t in targets.items() if n not in solid]
        self._solid = [(n, targets[n], _data_ptr(targets[n]), _n_bytes(targets[n])) for n in solid]
        self._raw_copy = raw_copy(table.memory.device)
        self.is_bare = not self._odd
        self.nbytes = sum(map(_n_bytes, targets.values()))
        self._ring: PageRing | None = None
        if reader is not None and reader.is_there():
            self._ring = PageRing([(address, nbytes) for *_, address, nbytes in self._solid], table, reader)

    def read(self) -> None:
        """The first that the graph does."""
        if self._ring is not None:
            self._ring.read()

    def copy_out(self, results: Sequence[torch.Tensor]) -> int:
        """The last that it does: copies of the first of these, of so many."""
        if self._ring is None:
            return 0
        self._ring.copy_out(results[:N_COPIES])
        return min(len(results), N_COPIES)

    def restart(self) -> None:
        """What has read so far was no replay."""
        if self._ring is not None:
            self._ring.restart()

    def send(self, values: Sequence[Any], numbers: Sequence[float], copies: Sequence[int]) -> None:
        """Before each replay, on the current stream: nothing that fails may come between this, the start and `started`. `copies`
        are `N_COPIES` addresses for results, 0 for none."""
        for number, target in self._odd:
            _copy(target, values[number])
        if self._ring is not None:
            self._ring.write([*[_data_ptr(values[number]) for number, *_ in self._solid], *copies], numbers)
            return
        self._table.set(numbers)
        for number, target, address, nbytes in self._solid:
            if not self._raw_copy(address, _data_ptr(values[number]), nbytes):
                _copy(target, values[number])

    def started(self) -> None:
        """The graph was started."""
        if self._ring is not None:
            self._ring.started()


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    with torch.no_grad():
        target.copy_(distinct(source), non_blocking=True)


def _n_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.itemsize
