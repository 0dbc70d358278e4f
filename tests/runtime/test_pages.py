"""Pages: what each replay is told, how far the host may be ahead, and what comes of replays that break off."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

import kitsune
from kitsune.backends import on_device, reader_of
from kitsune.codegen import PAGE_PROGRAMS
from kitsune.config import config
from kitsune.ir import Pending
from kitsune.ir.page import N_PAGES
from kitsune.runtime import PageReader, SlotTable, lent_outputs, page_ring
from kitsune.runtime.page_reader import Reading
from kitsune.runtime.page_ring import PageRing
from tests.runtime.backends import lazily
from tests.runtime.pages import naive_reader
from tests.runtime.repeated import counts, graphs

CPU = torch.device("cpu")


class Told:
    """A ring for two tensors and three numbers, and what has arrived."""

    def __init__(self, sizes: tuple[int, ...] = (40, 20_000), n_numbers: int = 3) -> None:
        reader = naive_reader()
        assert reader.is_there()
        self.places = [torch.zeros(size, dtype=torch.uint8) for size in sizes]
        self.table = SlotTable(n_numbers, CPU)
        self.ring = PageRing([(p.data_ptr(), p.numel()) for p in self.places], self.table, reader)
        self.ring.restart()
        # What nobody else holds any more would be another's memory when the device comes to read it.
        self.batches: list[list[torch.Tensor]] = []

    def write(self, k: int, numbers: Any = None, copies: tuple[int, int] = (0, 0)) -> None:
        """Tell of batch number k, which has other bytes than those near it."""
        self.batches.append([torch.full_like(place, k % 251) for place in self.places])
        self.ring.write([*(t.data_ptr() for t in self.batches[-1]), *copies], self.numbers(k) if numbers is None else numbers)

    def numbers(self, k: int) -> tuple[float, ...]:
        return k * 1.0, k * 0.5, -0.0

    def replay(self, k: int) -> None:
        self.write(k)
        self.ring.read()
        self.ring.started()

    def has(self, k: int) -> bool:
        """Is batch number k what came last, with its numbers?"""
        numbers = self.table.memory.tolist()
        return all(bool((p == k % 251).all()) for p in self.places) and numbers == [*self.numbers(k)]


def test_each_replay_has_its_batch_and_numbers() -> None:
    told = Told()
    for k in range(3 * N_PAGES + 5):
        told.replay(k)
        assert told.has(k)


@pytest.mark.parametrize("sizes", [(), (1, 7, 8, 9, 8191, 8192, 8193, 24_577)])
def test_any_number_of_bytes_and_nothing_else_is_copied(sizes: tuple[int, ...]) -> None:
    told = Told(sizes)
    # Each place with something behind it.
    told.places = [torch.zeros(size + 16, dtype=torch.uint8) for size in sizes]
    reader = naive_reader()
    assert reader.is_there()
    told.ring = PageRing([(p.data_ptr(), size) for p, size in zip(told.places, sizes, strict=True)], told.table, reader)
    told.replay(5)
    for place, size in zip(told.places, sizes, strict=True):
        assert bool((place[:size] == 5).all()) and not place[size:].any()


def test_the_host_waits_for_the_page_that_it_would_overwrite() -> None:
    told, written, n = Told(), [], N_PAGES + 8

    def host() -> None:
        for k in range(n):
            told.write(k)
            told.ring.started()
            written.append(k)

    thread = threading.Thread(target=host, daemon=True)
    thread.start()
    thread.join(0.2)
    # Nothing was read so far.
    assert len(written) == N_PAGES and thread.is_alive()
    for k in range(n):
        while len(written) <= k:
            thread.join(1e-4)
        told.ring.read()
        assert told.has(k)
        # A replay tells that those before it are over, and nothing of itself.
        assert len(written) <= k + N_PAGES
    thread.join(10)
    assert not thread.is_alive() and len(written) == n


def test_a_wait_in_vain_asks_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told()
    monkeypatch.setattr(page_ring, "ASK_S", 0.01)

    def lost() -> int:
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(told.ring._reading, "n_started", lost)
    for k in range(N_PAGES):
        told.write(k)
        told.ring.started()
    with pytest.raises(RuntimeError, match="the device is lost"):
        told.write(N_PAGES)


def not_started(told: Told) -> None:
    """Something broke off between the page and the graph's start."""
    told.write(99)


def not_said(told: Told) -> None:
    """Something broke off when the graph had been started."""
    told.write(99)
    told.ring.read()


@pytest.mark.parametrize("break_off", [not_started, not_said])
@pytest.mark.parametrize("before", [0, 1, N_PAGES - 1, N_PAGES, 100])
def test_a_replay_that_breaks_off_does_not_shift_the_pages(break_off: Callable[[Told], None], before: int) -> None:
    told = Told()
    for k in range(before):
        told.replay(k)
    break_off(told)
    for k in range(2 * N_PAGES):
        told.replay(k)
        assert told.has(k)
        break_off(told) if k % 20 == 0 else None


def test_numbers_that_never_arrived_are_sent_again() -> None:
    told = Told()
    told.replay(1)
    told.write(2, numbers := told.numbers(2))
    # The page was written and no graph started: the very same numbers come with the next one.
    told.write(2, numbers)
    told.ring.read()
    told.ring.started()
    assert told.has(2)


def test_a_list_of_numbers_is_looked_at_each_time() -> None:
    told = Told()
    numbers = [1.0, 2.0, 3.0]
    for value in (4.0, -0.0, 0.0, float("nan")):
        numbers[1] = value
        told.write(1, numbers)
        told.ring.read()
        told.ring.started()
        assert torch.equal(told.table.memory.view(torch.int64), torch.tensor(numbers, dtype=torch.float64).view(torch.int64))


def test_numbers_that_are_the_same_are_not_read_again() -> None:
    told = Told()
    numbers = told.numbers(7)
    told.write(7, numbers)
    told.ring.read()
    told.ring.started()
    told.table.memory.zero_()
    for same in (numbers, [*numbers]):
        told.write(7, same)
        told.ring.read()
        told.ring.started()
    assert not told.table.memory.any()


def test_a_run_may_have_fewer_numbers_or_more_than_the_table() -> None:
    told = Told()
    for numbers in ([1.0], [2.0, 3.0, 4.0, 5.0], [6.0, 7.0]):
        told.write(0, numbers)
        told.ring.read()
        told.ring.started()
    assert told.table.memory.tolist() == [6.0, 7.0, 4.0]


def test_results_are_copied_to_where_the_page_says() -> None:
    told = Told()
    results, copies = [torch.tensor(1.5), torch.tensor([2.0, 3.0, 4.0, 5.0])], [torch.zeros(1), torch.zeros(4)]
    places = [t.data_ptr() for t in copies]
    for at in ((0, places[1]), (places[0], 0)):
        told.write(1, copies=at)
        told.ring.read()
        told.ring.copy_out(results)
        told.ring.started()
        assert [bool(t.any()) for t in copies] == [at[0] != 0, True]
    assert copies[0].item() == 1.5 and copies[1].tolist() == [2.0, 3.0, 4.0, 5.0]


def test_numbers_that_are_held_are_copied_by_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    by_driver: list[int] = []
    copy = lent_outputs.raw_copy(CPU)
    monkeypatch.setattr(lent_outputs, "raw_copy", lambda device: lambda *of: (by_driver.append(1), copy(*of))[1])
    x, n = torch.zeros(3, 2), 40
    for pages in (True, False):
        x.zero_()
        with config.patch(gate=False, pages=pages), graphs(kernels=False), lazily():
            held = []
            for _ in range(n):
                x.add_(1)
                # Three results, of which the graph copies two.
                held += [x.sum(), (x * 2).sum(), (x * 3).sum()]
                kitsune.flush()
            assert counts("replayed", "moved")[0] > 30
        assert [t.item() for t in held] == [6.0 * (k // 3 + 1) * (k % 3 + 1) for k in range(3 * n)]
        assert len(by_driver) > 30 and len(by_driver) <= (n if pages else 4 * n)
    assert len(by_driver) > 3 * n


@pytest.mark.parametrize(("error", "n_asked"), [(Pending("read_page"), 3), (RuntimeError("no compiler"), 1)])
def test_kernels_that_are_not_there_are_asked_for_again_unless_they_failed(error: Exception, n_asked: int) -> None:
    asked: list[str] = []

    class Fails:
        def compile(self, program: Any, *variant: Any) -> Any:
            asked.append(program.name)
            raise error

    reader = PageReader(PAGE_PROGRAMS, Fails(), CPU)
    assert not any(reader.is_there() for _ in range(3)) and len(asked) == n_asked
    x = torch.arange(3.0)
    with pytest.MonkeyPatch.context() as patch, config.patch(gate=False), graphs(kernels=False), lazily():
        patch.setattr("kitsune.running.reader_of", lambda backend: reader)
        for k in range(12):
            y = (x + k) * 2
            kitsune.flush()
            assert y.tolist() == [2.0 * (i + k) for i in range(3)]
            x = x.clone()


def test_a_backends_graphs_begin_with_pages_unless_they_are_switched_off() -> None:
    asked: list[tuple[Any, ...]] = []
    needed: list[tuple[Any, ...]] = []

    class Asked:
        def ask(self, program: Any, *variant: Any) -> Any:
            asked.append((program.name, *variant))
            return Future()

        def compile(self, program: Any, *variant: Any) -> Any:
            needed.append((program.name, *variant))
            return SimpleNamespace(load=lambda: None)

        def expect(self) -> None:
            pass

    backend = on_device("sm_90", cast(Any, Asked()), CPU)
    nothing_else = SimpleNamespace(likely=None)
    assert backend.warm is not None and reader_of(backend) is backend.reader is not None
    assert len(backend.warm(cast(Any, None), nothing_else)) == len(PAGE_PROGRAMS)
    # Another variant would be compiled beside the one that is waited for.
    assert backend.reader.is_there() and asked == needed == [(program.name, CPU, 1, False) for program in PAGE_PROGRAMS]
    with config.patch(pages=False):
        assert reader_of(backend) is None and not backend.warm(cast(Any, None), nothing_else)
    assert reader_of("There are no kernels.") is None


def test_a_held_number_that_is_written_after_the_graph_is_copied_then() -> None:
    x, held = torch.ones(3, 2), []
    with config.patch(gate=False), graphs(kernels=False), lazily():
        for k in range(30):
            total = (x * 2).sum()
            # No kernel that could read a number which moves: it is called when the graph has been replayed.
            total.mul_(1.0 + k)
            kitsune.flush()
            held.append(total)
        assert counts("replayed", "moved")[0] > 20 and not counts("graph_refused")[0], kitsune.counters()
    assert [total.item() for total in held] == [12.0 * (1 + k) for k in range(30)]


def test_memory_of_a_ring_that_is_gone_is_used_again_and_brings_nothing() -> None:
    told = Told()
    told.replay(3)
    memory = told.ring._bytes
    where, kept = told.ring._reading._pages.first, told.places
    del told, memory
    again = Told()
    assert again.ring._reading._pages.first == where
    again.ring.read()
    assert not any(place.any() for place in again.places) and all(bool((p == 3).all()) for p in kept)


BATCHES = [(torch.full((5, 7), float(k)), torch.arange(k, k + 33)) for k in range(3 * N_PAGES)]


@pytest.mark.parametrize("pages", [True, False])
def test_replays_far_beyond_the_ring_are_as_in_eager(pages: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # A steady replay asks the device nothing.
    monkeypatch.setattr(Reading, "n_started", lambda self: pytest.fail("the device was asked how far it is"))
    with config.patch(gate=False, pages=pages), graphs(), lazily():
        got = []
        for k, (x, y) in enumerate(BATCHES):
            got.append((x.add(1) * 0.5**k + y.sum()).clone())
            kitsune.flush()
        assert counts("replayed")[0] > 2 * N_PAGES
    for k, (x, y) in enumerate(BATCHES):
        assert torch.equal(got[k], x.add(1) * 0.5**k + y.sum())
