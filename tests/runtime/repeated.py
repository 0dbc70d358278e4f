"""Graphs without a device: work that is done again into the memory of its first time, as the replay of a CUDA graph does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

import kitsune
from kitsune.config import config
from kitsune.dispatch import below_autograd
from kitsune.ir import Access, Launch, storage_of
from kitsune.running import Backend
from kitsune.runtime import SlotTable
from kitsune.runtime.alignment import place_like
from kitsune.runtime.cuda_graph import Work
from tests.runtime.checked import forget, get_state, set_state
from tests.runtime.naive import at_address
from tests.runtime.pages import naive_reader
from tests.runtime.test_real_plans import Walk


class Repeated:
    """Work that fills the same outputs each time."""

    def __init__(self, work: Work, places: list[Any], outputs: list[torch.Tensor], recorder: Repeater) -> None:
        self.work, self.places, self.outputs, self.recorder = work, places, outputs, recorder
        self._memory = list(outputs)
        self.nbytes = sum(storage_of(t).nbytes() for t in outputs)
        self.destroyed = False
        # What the last replay has sent to the host.
        self.numbers: list[Any] = []

    def replay(self) -> None:
        assert not self.destroyed
        self.recorder.fail_if("replay")
        self.numbers = []
        # A graph knows of no autocast that is on where it is launched.
        with below_autograd(), torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
            again = self.work([place() for place in self.places], lambda tensors: self.numbers.extend(t.item() for t in tensors))
        for storage, fresh in {storage_of(a)._cdata: (storage_of(a), storage_of(b)) for a, b in self._pairs(again)}.values():
            storage.copy_(fresh)

    def sent(self, k: int) -> Any:
        return self.numbers[k]

    def _pairs(self, again: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(zip(self._memory, again, strict=True))

    def destroy(self) -> None:
        self.destroyed = True
        self.recorder.n_alive -= 1
        self.work = lambda inputs, send: []
        self._memory = []


class Repeater:
    """Records by running the work once and undoing what it did to its inputs and to the generator."""

    def __init__(self) -> None:
        self.n_alive = self.n_recorded = 0
        # What is to go wrong: "record" or "replay", and how.
        self.broken: dict[str, Exception] = {}

    def fail_if(self, what: str) -> None:
        if what in self.broken:
            raise self.broken[what]

    def follow_stream(self) -> bool:
        return True

    def record(self, work: Work, inputs: Sequence[torch.Tensor], n_sent: int = 0, nbytes: int = 0) -> Repeated:
        state = get_state(torch.default_generator)
        storages = {storage_of(t)._cdata: storage_of(t) for t in inputs}
        before = [(storage, storage.clone()) for storage in storages.values()]
        # By address: a graph does not keep its inputs alive.
        places = [place_of(t) for t in inputs]
        try:
            sent: list[int] = []
            outputs = work([place() for place in places], lambda tensors: sent.append(len([t.reshape(()) for t in tensors])))
            assert sent == ([n_sent] if n_sent else [])
            self.fail_if("record")
        finally:
            for storage, content in before:
                storage.copy_(content)
            set_state(torch.default_generator, state)
        for t in outputs:
            # Not computed yet: whoever reads it before the first replay is to notice.
            storage_of(t).fill_(0x55)
        self.n_alive += 1
        self.n_recorded += 1
        return Repeated(work, places, outputs, self)


def place_of(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Makes tensors where this one is, without holding it."""
    memory, n = storage_of(tensor).data_ptr(), storage_of(tensor).nbytes() // tensor.itemsize
    offset, shape, stride = torch._C.TensorBase.storage_offset(tensor), tensor.shape, tensor.stride()
    dtype, marks = tensor.dtype, (tensor.is_conj(), tensor.is_neg())

    def place() -> torch.Tensor:
        twin = at_address(memory, dtype, (n,), (1,)).as_strided(shape, stride, offset)
        torch._C._set_conj(twin, marks[0])
        torch._C._set_neg(twin, marks[1])
        return twin

    return place


class WalkInGraph(Walk):
    """Reads moving numbers from the table, as the kernels of a captured launch do."""

    def __init__(self, launch: Launch, table: SlotTable) -> None:
        super().__init__(launch)
        self.table, self.n_filled = table, 0

    def start(self, address: Callable[[Access], int], scalars: list[float], stream: int) -> None:
        super().start(address, self.table.memory.tolist(), stream)

    def fill_tables(self) -> None:
        self.n_filled += 1


@contextlib.contextmanager
def graphs(kernels: bool = True) -> Iterator[Repeater]:
    """New pipelines on the CPU capture and replay; with kernels or op by op."""
    repeater = Repeater()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kitsune.running.recorder_of", lambda device: repeater)
        patch.setattr("kitsune.running.reader_of", lambda backend: naive_reader() if config.pages else None)
        # A graph is recorded by running its work, which memory that nobody has written leads astray: positions beyond the end.
        patch.setattr("kitsune.runtime.captured.place_like", _filled)
        if kernels:
            found = Backend("sm_90", Walk, lambda launch, usable, table: WalkInGraph(launch, table))
            patch.setattr("kitsune.running.backend_of", lambda device: found)
        forget()
        yield repeater
    forget()


def _filled(tensor: torch.Tensor, exactly: bool) -> torch.Tensor:
    twin = place_like(tensor, exactly)
    # All of its memory, once: an expanded tensor cannot be written.
    n = storage_of(twin).nbytes() // twin.itemsize - twin.storage_offset()
    twin.as_strided((n,), (1,)).copy_(tensor.as_strided((n,), (1,), tensor.storage_offset()))
    return twin


def counts(*names: str) -> list[Any]:
    """Some of the counters."""
    return [kitsune.counters()[name] for name in names]
