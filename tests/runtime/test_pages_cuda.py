"""Pages on a GPU: what its kernels read and copy, how far ahead the host gets, and training beyond the ring."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kitsune
from kitsune.codegen import PAGE_PROGRAMS, Compiler
from kitsune.config import config
from kitsune.ir.page import N_PAGES
from kitsune.runtime import CudaGraphs, PageReader, SlotTable
from kitsune.runtime.page_ring import PageRing
from tests.runtime.checked import forget
from tests.runtime.repeated import counts

pytestmark = pytest.mark.gpu
SIZES = (1, 7, 8, 9, 8191, 8192, 8193, 300_001)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> PageReader:
    made = PageReader(
        PAGE_PROGRAMS, Compiler(tmp_path_factory.mktemp("kernels")), torch.device("cuda", torch.cuda.current_device())
    )
    assert made.is_there()
    return made


class Device:
    """A graph that takes tensors and three numbers in, and adds what it has seen to sums."""

    def __init__(self, reader: PageReader, sizes: tuple[int, ...] = SIZES, ends_at: int = 0, slow: bool = False) -> None:
        device = torch.device("cuda", torch.cuda.current_device())
        memory = [torch.zeros(size + 32, dtype=torch.uint8, device=device) for size in sizes]
        self.places = [t[ends_at : ends_at + size] for t, size in zip(memory, sizes, strict=True)]
        self.whole = memory
        self.table, self.history = SlotTable(3, device), torch.zeros(4 * N_PAGES, len(sizes) + 3, device=device)
        self.k = torch.zeros(1, dtype=torch.int64, device=device)
        self.ring = PageRing([(t.data_ptr(), t.numel()) for t in self.places], self.table, reader)

        def work(inputs: Any, send: Any) -> list[torch.Tensor]:
            if slow:
                torch.cuda._sleep(200_000)
            self.ring.read()
            seen = [*(t.double().mean().reshape(1) for t in self.places), self.table.memory]
            self.history.index_copy_(0, self.k, torch.cat(seen).float()[None])
            self.k += 1
            return []

        warm = [t.double().mean() for t in self.places]
        self.history.index_copy_(0, self.k, self.history[:1] * 0)
        del warm
        torch.cuda.synchronize()
        self.graph = CudaGraphs(device).record(work, [])
        self.ring.restart()

    def tell(self, k: int, begins_at: int = 0) -> None:
        # On the stream that the graph runs on: it may be another's memory once the graph has been started.
        wide = [torch.full((t.numel() + 32,), k % 251, dtype=torch.uint8, device=t.device) for t in self.places]
        batch = [w[begins_at : begins_at + t.numel()] for w, t in zip(wide, self.places, strict=True)]
        self.ring.write([*(t.data_ptr() for t in batch), 0, 0], (float(k), k * 0.5, -1.0))

    def replay(self, k: int, begins_at: int = 0) -> None:
        self.tell(k, begins_at)
        self.graph.replay()
        self.ring.started()

    def saw(self) -> list[list[float]]:
        torch.cuda.synchronize()
        rows: list[list[float]] = self.history[: int(self.k)].tolist()
        return rows

    def expected(self, ks: list[int]) -> list[list[float]]:
        return [[*[float(k % 251)] * len(self.places), float(k), k * 0.5, -1.0] for k in ks]


@pytest.mark.parametrize("ends_at", [0, 8, 3])
@pytest.mark.parametrize("begins_at", [0, 4, 8, 1])
def test_bytes_come_over_from_any_address_to_any(reader: PageReader, begins_at: int, ends_at: int) -> None:
    device = Device(reader, ends_at=ends_at)
    ks = list(range(1, 8))
    for k in ks:
        device.replay(k, begins_at)
    assert device.saw() == device.expected(ks)
    # And nothing else is written.
    for place, whole in zip(device.places, device.whole, strict=True):
        assert int(whole.long().sum()) == int(place.long().sum())


@pytest.mark.parametrize("slow", [False, True])
def test_replays_one_after_the_other_without_a_wait(reader: PageReader, slow: bool) -> None:
    device, ks = Device(reader, slow=slow), list(range(3 * N_PAGES + 7))
    for k in ks:
        device.replay(k)
    assert device.saw() == device.expected(ks)


def test_the_host_does_not_get_further_ahead_than_the_ring(reader: PageReader) -> None:
    device = Device(reader, (64,), slow=True)
    torch.cuda.synchronize()
    for k in range(3 * N_PAGES):
        device.replay(k)
        assert device.ring._n - device.ring._over.value <= N_PAGES + 1
    begin = time.perf_counter()
    assert len(device.saw()) == 3 * N_PAGES
    # It did get ahead: there was something left to wait for.
    assert time.perf_counter() - begin > 1e-3


def test_replays_that_break_off_do_not_shift_the_pages(reader: PageReader) -> None:
    device, ks = Device(reader), []
    for k in range(2 * N_PAGES + 9):
        if k % 10 == 4:
            device.tell(99)
        if k % 10 == 7:
            # Started, and nobody came to say so.
            device.tell(k + 1000)
            device.graph.replay()
            ks.append(k + 1000)
        device.replay(k)
        ks.append(k)
    assert device.saw() == device.expected(ks)


def test_on_streams_that_take_turns(reader: PageReader) -> None:
    device, streams = Device(reader), [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for k in range(2 * N_PAGES):
        streams[k % 2].wait_stream(streams[1 - k % 2])
        with torch.cuda.stream(streams[k % 2]):
            device.replay(k)
    assert device.saw() == device.expected(list(range(2 * N_PAGES)))


def test_results_are_copied_to_where_the_page_says(reader: PageReader) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    table, x = SlotTable(1, device), torch.zeros(2, device=device)
    # It does not keep the table, into whose memory its numbers go.
    ring = PageRing([], table, reader)
    loss, pair = torch.zeros((), device=device), torch.zeros(2, dtype=torch.complex64, device=device)

    def work(inputs: Any, send: Any) -> list[torch.Tensor]:
        ring.read()
        inputs[0].add_(1)
        loss.copy_(inputs[0].sum())
        pair.copy_(inputs[0])
        ring.copy_out([loss, pair])
        return []

    work([x], None)
    torch.cuda.synchronize()
    x.zero_()
    graph, copies = CudaGraphs(device).record(work, [x]), []
    ring.restart()
    for k in range(3 * N_PAGES):
        copies.append((torch.empty_like(loss), torch.empty_like(pair)))
        ring.write([0 if k % 3 == 1 else copies[-1][0].data_ptr(), copies[-1][1].data_ptr()], (1.0,))
        graph.replay()
        ring.started()
    assert [int(a) for k, (a, _) in enumerate(copies) if k % 3 != 1] == [2 * (k + 1) for k in range(3 * N_PAGES) if k % 3 != 1]
    assert [b.tolist() for _, b in copies] == [[k + 1, k + 1] for k in range(3 * N_PAGES)]


@pytest.fixture
def repeatable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    forget()
    with config.patch(numerics="bitwise", gate=False):
        yield
    forget()


def train(how: str, steps: int = 200) -> list[torch.Tensor]:
    """Batches begin elsewhere each time, at multiples of 16 bytes, as libraries like them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(60, 128), nn.GELU(), nn.Dropout(0.2), nn.Linear(128, 10)).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 7, 0.9)
    data, targets = torch.randn(4 * steps + 32 * 60, device="cuda"), torch.randint(0, 10, (steps + 32,), device="cuda")

    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    call = kitsune.accelerate(step, static=True) if how == "static" else step
    losses = []
    with kitsune.accelerate() if how == "loop" else contextlib.nullcontext():
        for k in range(steps):
            if k == 40 and how != "eager":
                kitsune.wait_for_kernels(30)
            losses.append(call(data[4 * k : 4 * k + 32 * 60].view(32, 60), targets[k : k + 32]))
            schedule.step()
    return [*losses, *model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None), torch.cuda.get_rng_state()]


@pytest.mark.parametrize("how", ["loop", "static"])
@pytest.mark.parametrize("pages", [True, False])
def test_two_hundred_steps_are_eagers_bit_for_bit(repeatable: None, how: str, pages: bool) -> None:
    expected = train("eager")
    with config.patch(pages=pages):
        got = train(how)
    assert len(got) == len(expected) and all(map(torch.equal, got, expected)), kitsune.counters()
    assert counts("replayed")[0] > 120, kitsune.counters()
