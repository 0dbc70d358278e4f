"""Memory that a graph lends and takes back, while others read and write it on streams of their own."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

import kitsune
from kitsune.ir import lent_memory, streams
from kitsune.lazy.stream_changes import taking
from tests.runtime.repeated import counts, graphs

pytestmark = pytest.mark.usefixtures("fresh")
N_ROUNDS = 10
LATE = 50_000_000  # cycles: some 30 ms, in which the program is far ahead


def reduced_by_others(result: torch.Tensor) -> None:
    """An operator of FSDP's, which goes on with what it is given on a stream of its own."""
    torch.ops.fsdp.chunk_cat([result], 0, 1, out=torch.empty(1, 4))


def read_by_others(result: torch.Tensor) -> None:
    torch.ops.streams_of_tests.read(result)


@torch.library.custom_op("streams_of_tests::read", mutates_args=())
def read(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize(("door", "stays"), [(reduced_by_others, False), (read_by_others, True)])
def test_what_a_collective_has_is_not_moved_by_the_next_replay(door: Callable[[torch.Tensor], None], stays: bool) -> None:
    import torch.distributed.fsdp  # its operators

    x = torch.arange(4.0)
    with graphs(), kitsune.accelerate(device="cpu"):
        for _ in range(N_ROUNDS):
            result: Any = (x * 2).sin()
            kitsune.flush()
        assert counts("replayed")[0] > 0
        memory = lent_memory(result.cell.real)
        assert memory is not None
        door(result)
        assert (lent_memory(result.cell.real) is memory) == stays
        assert torch.equal(result, (x * 2).sin())


def entered(stream: Any) -> None:
    with stream:
        pass


@pytest.mark.parametrize("door", [entered, lambda s: s.synchronize(), lambda s: s.wait_event(torch.Event(device="cpu"))])
def test_streams_of_no_device_in_particular_are_doors(door: Callable[[Any], None]) -> None:
    x = torch.ones(3)
    with kitsune.accelerate(warmup=0, device="cpu"):
        y = x * 2
        door(torch.Stream(device="cpu"))
        assert kitsune.counters()["flushed"] == {"SYNCHRONIZE": 1}
        assert y.tolist() == [2.0] * 3


@torch.library.custom_op("streams_of_tests::add_late", mutates_args=("x",))
def add_late(x: torch.Tensor) -> None:
    torch.cuda._sleep(LATE)
    x.add_(100)


@torch.library.custom_op("streams_of_tests::copy_late", mutates_args=("to",))
def copy_late(x: torch.Tensor, to: torch.Tensor) -> None:
    torch.cuda._sleep(LATE)
    to.copy_(x)


def training(way: str, context: Any) -> list[torch.Tensor]:
    """Each round's result is held, and written or read by another stream, long after the next round has been started."""
    x, aside, found = torch.ones(1 << 16, device="cuda"), torch.cuda.Stream(), []
    copies = [torch.zeros_like(x) for _ in range(N_ROUNDS)]
    torch.cuda.synchronize()
    with context:
        for k in range(N_ROUNDS):
            result = (x * (k + 1.0)).sin()
            aside.wait_stream(torch.cuda.current_stream())
            with aside if way == "its own with" else torch.cuda.stream(aside):
                if way == "written":
                    add_late(result)
                else:
                    copy_late(result, copies[k])
            found.append(result)
        torch.cuda.current_stream().wait_stream(aside)
        found = [t.clone() for t in (*found, *copies)]
    torch.cuda.synchronize()
    return [t.clone() for t in found]


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["written", "read", "its own with"])
def test_results_are_moved_behind_what_other_streams_do_with_them(way: str) -> None:
    if way == "its own with" and not hasattr(torch.cuda.Stream, "__enter__"):
        pytest.skip("this torch has no such streams")
    expected = training(way, contextlib.nullcontext())
    kitsune.reset()
    got = training(way, kitsune.accelerate())
    assert counts("replayed")[0] > 3 and all(map(torch.equal, got, expected))


@pytest.mark.gpu
@pytest.mark.parametrize("make", [torch.cuda.Stream, lambda: torch.Stream(device="cuda")])
def test_operators_run_on_the_stream_that_they_were_called_on(make: Callable[[], Any]) -> None:
    stream = make()
    if not hasattr(stream, "__enter__"):
        pytest.skip("this torch has no such streams")
    x = torch.ones(1 << 20, device="cuda")
    torch.cuda.synchronize()
    with kitsune.accelerate(warmup=0):
        for _ in range(6):
            y = x * 2
            before = kitsune.counters()["flushed"].get("SYNCHRONIZE", 0)
            with stream:
                assert kitsune.counters()["flushed"]["SYNCHRONIZE"] == before + 1
                z = x * 3
            torch.cuda.current_stream().wait_event(stream.record_event())
            assert kitsune.counters()["flushed"]["SYNCHRONIZE"] == before + 2
            assert (y + z).sum().item() == 5 << 20


class OnGpu:
    """A recorder of the CPU that says to be one of a CUDA device."""

    device = torch.device("cuda:0")

    def __init__(self, recorder: Any) -> None:
        self._recorder = recorder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._recorder, name)


class Switched:
    """A device with streams, as a recorder sees them: numbers, of which one is the current one."""

    def __init__(self) -> None:
        self.now, self.entered, self.used = 7, [], []  # type: ignore[var-annotated]

    @contextlib.contextmanager
    def on(self, device: torch.device, handle: int) -> Any:
        before, self.now = self.now, handle
        self.entered.append(handle)
        yield
        self.now = before


def test_what_is_pending_runs_on_its_own_stream_where_no_door_tells_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    device, x = Switched(), torch.ones(3)
    monkeypatch.setattr(streams, "handle_of", lambda _: lambda: device.now)
    monkeypatch.setattr(streams, "on", device.on)
    monkeypatch.setattr(streams, "use", device.used.append)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: device.now)
    with kitsune.accelerate(warmup=0, device="cpu"):
        (pipeline,) = kitsune.contexts.here.depth
        recorder = pipeline.recorder
        monkeypatch.setattr(recorder, "shared", True)
        cuda = OnGpu(recorder)
        monkeypatch.setattr(recorder, "_acquire", taking(cuda, recorder.lock))
        y = x + 1
        z = y * 2
        assert not kitsune.counters()["flushed"] and device.used == [7]
        device.now = 9
        w = z * 3
        assert kitsune.counters()["flushed"] == {"SYNCHRONIZE": 1} and device.entered == [7] and device.used == [7, 9]
        v = w + 1
        assert device.entered == [7]
        device.now = 7
        assert v.tolist() == [13.0] * 3


@pytest.mark.parametrize("where", ["asking", "running"])
def test_an_interrupt_while_streams_are_told_apart_leaves_no_lock(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    lock, recorder = threading.Lock(), OnGpu(None)
    monkeypatch.setattr(streams, "handle_of", lambda _: interrupted if where == "asking" else lambda: 7)
    monkeypatch.setattr(streams, "use", interrupted)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: 7)
    with pytest.raises(KeyboardInterrupt):
        taking(recorder, lock)()
    assert not lock.locked()
