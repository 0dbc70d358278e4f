"""Memory that a graph lends and takes back, while others read and write it on streams of their own."""

from __future__ import annotations

import contextlib
import threading
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import library

import kitsune
from kitsune.ir import lent_memory, streams
from kitsune.lazy import early_reads
from kitsune.lazy.stream_changes import called_here, taking
from tests.runtime.repeated import counts, graphs

pytestmark = pytest.mark.usefixtures("fresh")
N_ROUNDS = 10
LATE = 50_000_000  # cycles: some 30 ms, in which the program is far ahead


def reduced_by_others(result: torch.Tensor) -> None:
    """An operator of FSDP's, which goes on with what it is given on a stream of its own."""
    torch.ops.fsdp.chunk_cat([result], 0, 1, out=torch.empty(1, 4))


def read_by_others(result: torch.Tensor) -> None:
    torch.ops.streams_of_tests.read(result)


@library.custom_op("streams_of_tests::read", mutates_args=())
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


@library.custom_op("streams_of_tests::add_late", mutates_args=("x",))
def add_late(x: torch.Tensor) -> None:
    torch.cuda._sleep(LATE)
    x.add_(100)


@library.custom_op("streams_of_tests::copy_late", mutates_args=("to",))
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


@library.custom_op("streams_of_tests::fives", mutates_args=())
def fives(x: torch.Tensor) -> torch.Tensor:
    return torch.full_like(x, 5.0)


@pytest.mark.gpu
def test_memory_of_what_was_moved_on_another_stream_is_given_away_when_all_have_read_it() -> None:
    x, aside, main = torch.rand(1 << 16, device="cuda"), torch.cuda.Stream(), torch.cuda.current_stream()
    copies = [torch.zeros_like(x) for _ in range(N_ROUNDS)]
    torch.cuda.synchronize()
    with kitsune.accelerate():
        for k in range(N_ROUNDS):
            result = (x * (k + 1.0)).sin()
            kitsune.flush()
            aside.wait_stream(main)
            with torch.cuda.stream(aside):
                # The same region is replayed, ahead of which the result is moved, to memory that is the other stream's.
                other = (x * (k + 2.0)).sin()
                kitsune.flush()
            copy_late(result, copies[k])
            del result
            with torch.cuda.stream(aside):
                filled = fives(x)
            main.wait_stream(aside)
            del filled, other
    torch.cuda.synchronize()
    assert counts("replayed")[0] > N_ROUNDS and counts("moved")[0] > 3
    assert all(torch.equal(copies[k], (x * (k + 1.0)).sin()) for k in range(N_ROUNDS))


def prefetched(context: Any) -> list[torch.Tensor]:
    """The next batch is copied to the device beside the step, late, and the program lets go of it while it is still read."""
    aside, losses = torch.cuda.Stream(), []
    torch.manual_seed(0)
    weight = torch.randn(256, 256, device="cuda").div(16).requires_grad_()
    optimizer = torch.optim.SGD([weight], lr=0.05)
    batches = [torch.randn(256, 256, generator=torch.Generator().manual_seed(k)).pin_memory() for k in range(2 * N_ROUNDS)]
    torch.cuda.synchronize()

    def fetch(k: int) -> torch.Tensor:
        with torch.cuda.stream(aside):
            torch.cuda._sleep(LATE // 10)
            x = batches[k].to("cuda", non_blocking=True)
            return x.sub(0.5)

    with context:
        coming = fetch(0)
        for k in range(1, 2 * N_ROUNDS):
            torch.cuda.current_stream().wait_stream(aside)
            x = coming
            x.record_stream(torch.cuda.current_stream())
            coming = fetch(k)
            torch.cuda._sleep(LATE // 10)
            loss = (x @ weight).tanh().square().mean()
            del x
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        losses = [t.clone() for t in losses]
    torch.cuda.synchronize()
    return [*losses, weight.detach().clone()]


@pytest.mark.gpu
@pytest.mark.parametrize("warmup", [0, 1])
def test_batches_that_are_copied_beside_the_step(warmup: int) -> None:
    expected = prefetched(contextlib.nullcontext())
    kitsune.reset()
    got = prefetched(kitsune.accelerate(warmup=warmup))
    assert counts("replayed")[0] > N_ROUNDS and all(map(torch.equal, got, expected))


class OnGpu:
    """A recorder of the CPU that says to be one of a CUDA device."""

    def __init__(self, recorder: Any) -> None:
        vars(self).update(_recorder=recorder, device=torch.device("cuda:0"))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._recorder, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._recorder, name, value)


class Switched:
    """A device with streams, as a recorder sees them: numbers, of which one is the current one."""

    def __init__(self) -> None:
        self.now, self.told = 7, []  # type: ignore[var-annotated]

    @contextlib.contextmanager
    def on(self, device: torch.device, handle: int) -> Any:
        before, self.now = self.now, handle
        self.told.append(f"on {handle}")
        yield
        self.now = before

    def waits(self, device: torch.device) -> None:
        self.told.append(f"{self.now} waits")

    def since(self) -> list[str]:
        told, self.told = self.told, []
        return told


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Switched:
    device = Switched()
    monkeypatch.setattr(streams, "handle_of", lambda _: lambda: device.now)
    monkeypatch.setattr(streams, "on", device.on)
    monkeypatch.setattr(streams, "use", lambda _: None)
    monkeypatch.setattr(streams, "wait_for_all", device.waits)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: device.now)
    return device


@contextlib.contextmanager
def recorded_on(monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    """A context whose operators are recorded as on a CUDA device."""
    with kitsune.accelerate(device="cpu", **options):
        (pipeline,) = kitsune.contexts.here.depth
        recorder = pipeline.recorder
        monkeypatch.setattr(recorder, "shared", True)
        monkeypatch.setattr(recorder, "_acquire", taking(OnGpu(recorder), recorder.lock))
        yield


JOINED = ["on 7", "7 waits", "9 waits"]


def test_what_is_pending_runs_on_its_own_stream_where_no_door_tells_of_another(
    device: Switched, monkeypatch: pytest.MonkeyPatch
) -> None:
    with recorded_on(monkeypatch, warmup=0):
        y = torch.ones(3) + 1
        z = y * 2
        assert not kitsune.counters()["flushed"] and device.since() == []
        device.now = 9
        w = z * 3
        # Whatever was ordered by events is not ordered by those that were recorded when the calls were made.
        assert kitsune.counters()["flushed"] == {"SYNCHRONIZE": 1} and device.since() == [*JOINED, "9 waits"]
        v = w + 1
        assert device.since() == []
        device.now = 7
        # Nothing is called on the other stream: who reads comes from there.
        assert v.tolist() == [13.0] * 3 and device.since() == ["on 9", "9 waits", "7 waits"]


def test_what_comes_on_another_stream_waits_though_nothing_is_pending(device: Switched, monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd tells the allocator which streams read a gradient by its wrapper, which has no memory to be kept."""
    with recorded_on(monkeypatch, warmup=1):
        y = torch.ones(3) + 1
        device.now = 9
        before = early_reads._last_change
        (pipeline,) = kitsune.contexts.here.depth
        pipeline.recorder._acquire()
        pipeline.recorder._release()
        # Nor is a number that was sent early an answer any more.
        assert early_reads._last_change > before
        _ = y * 2
        assert kitsune.counters()["recorded"] == 0 and "9 waits" in device.since()


@pytest.mark.parametrize("where", ["asking", "running"])
def test_an_interrupt_while_streams_are_told_apart_leaves_no_lock(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    lock, recorder = threading.Lock(), OnGpu(types.SimpleNamespace())
    monkeypatch.setattr(streams, "handle_of", lambda _: interrupted if where == "asking" else lambda: 7)
    monkeypatch.setattr(streams, "use", interrupted)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: 7)
    with pytest.raises(KeyboardInterrupt):
        taking(recorder, lock)()
    assert not lock.locked()


@contextlib.contextmanager
def numbered(monkeypatch: pytest.MonkeyPatch, captured: set[int]) -> Any:
    """Streams 7, which is the current one, and 9 as the real functions see them, some being captured; what is waited for."""
    now, waits, known = [7], [], {n: types.SimpleNamespace(cuda_stream=n, stream_id=0, device_index=0) for n in (7, 9)}
    monkeypatch.setattr(streams, "_used", {})
    monkeypatch.setattr(streams, "_left", {0: {11: "event of 11"}})
    monkeypatch.setattr(streams, "handle_of", lambda _: lambda: now[0])
    monkeypatch.setattr(streams, "current", lambda _: now[0])
    monkeypatch.setattr(streams, "place_of", lambda stream: stream.cuda_stream)
    monkeypatch.setattr(streams, "enter", lambda n: now.__setitem__(0, n))
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", lambda index: None, raising=False)
    monkeypatch.setattr(streams, "_event_on", lambda stream: f"event on {stream.cuda_stream}")
    waited: Any = lambda event, stream: waits.append(f"{stream.cuda_stream}: {event}")  # noqa: E731
    monkeypatch.setattr(torch._C, "_CudaEventBase", types.SimpleNamespace(wait=waited))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: known[now[0]])
    monkeypatch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: now[0] in captured)
    yield types.SimpleNamespace(now=now, waits=waits, known=known)


def test_the_stream_that_a_context_is_entered_on_is_one_that_the_program_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    """No door has told of it: it was the current one before there were any."""
    with numbered(monkeypatch, set()) as device, kitsune.accelerate(device="cpu"):
        (pipeline,) = kitsune.contexts.here.depth
        called_here(OnGpu(pipeline.recorder))
        assert streams._used == {0: {7: device.known[7]}} and pipeline.recorder.stream == 7
        before, device.now[0] = early_reads._last_change, 9
        other = threading.Thread(target=called_here, args=(OnGpu(pipeline.recorder),))
        other.start()
        other.join()
        # The current stream is each thread's own.
        assert pipeline.recorder.stream == 7 and early_reads._last_change == before
        monkeypatch.setattr(pipeline.recorder, "running", True)
        called_here(OnGpu(pipeline.recorder))
        # In the middle of a run it may be one of Kitsune's own.
        assert pipeline.recorder.stream == 7 and early_reads._last_change == before
        monkeypatch.setattr(pipeline.recorder, "running", False)
        called_here(OnGpu(pipeline.recorder))
        assert pipeline.recorder.stream == 9 and early_reads._last_change > before
        pipeline.recorder.stream = -1


def test_a_recorder_hears_which_stream_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[tuple[str, Any]] = []
    monkeypatch.setattr("kitsune.lazy.recording.called_here", lambda one: heard.append(("context", one)))
    monkeypatch.setattr("kitsune.lazy.door_makers.called_here", lambda one: heard.append(("door", one)))
    with kitsune.accelerate(device="cpu"):
        (pipeline,) = kitsune.contexts.here.depth
        assert heard == [("context", pipeline.recorder)]
        with torch.Stream(device="cpu"):
            assert heard[1:] == [("door", pipeline.recorder)]
        assert heard[2:] == [("door", pipeline.recorder)]


ON_9, OF_11 = "7: event on 9", "7: event of 11"


@pytest.mark.parametrize(("captured", "waits"), [(set(), [ON_9, OF_11]), ({7}, []), ({7, 9}, [ON_9])])
def test_what_is_captured_waits_for_what_is_captured_alone(
    captured: set[int], waits: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with numbered(monkeypatch, captured) as device:
        streams._used[0] = device.known
        streams.wait_for_all(torch.device("cuda:0"))
        assert device.waits == waits and device.now == [7]


def test_an_interrupt_at_the_entry_of_a_stream_leaves_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    with numbered(monkeypatch, set()) as device:

        def interrupted(n: int) -> None:
            device.now[0] = n
            if n == 9:
                raise KeyboardInterrupt

        monkeypatch.setattr(streams, "enter", interrupted)
        with pytest.raises(KeyboardInterrupt), streams.entered(device.known[9]):
            pass
        assert device.now == [7]
