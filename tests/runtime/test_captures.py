"""CUDA graphs and pools of memory of the program's own: what is captured is started then, and what it refers to stays."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kitsune
from kitsune import background, paced_thread
from kitsune.background import wait
from kitsune.config import config
from kitsune.ir import lent_memory, streams, workspaces
from kitsune.lazy import LazyTensor, captures
from kitsune.paced_thread import PacedThread
from tests.runtime.repeated import counts, graphs

pytestmark = pytest.mark.usefixtures("fresh")
N_ROUNDS = 12


class Graph:
    """What a program captures with, on a device that is not there: it asks what is running."""

    def __init__(self, log: list[str], fails: str = "") -> None:
        self.log, self.fails = log, fails

    def __getattr__(self, name: str) -> Callable[[], None]:
        if name not in ("capture_begin", "capture_end", "replay", "reset"):
            raise AttributeError(name)

        def method() -> None:
            self.log.append(name)
            if self.fails == name:
                raise RuntimeError(f"{name} fails")

        return method


@pytest.fixture
def doors(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The doors of a graph's methods."""
    makers = {
        "capture_begin": captures.capture_begin_door,
        "capture_end": captures.capture_end_door,
        "reset": captures.capture_end_door,
        "replay": captures.replay_door,
    }
    made = {name: make(lambda graph, name=name: getattr(graph, name)()) for name, make in makers.items()}
    yield type("Doors", (), {name: staticmethod(door) for name, door in made.items()})
    assert not captures._under_way and not background.thread.pauses
    assert wait(20)


def is_recorded(tensor: torch.Tensor) -> bool:
    return type(tensor) is LazyTensor


def n_recorded() -> int:
    """Operators of the regions that have ended."""
    counters = kitsune.counters()
    return int(counters["recorded"] + counters["recognised"])


def test_while_the_program_captures_nothing_is_recorded(doors: Any) -> None:
    x, log = torch.ones(3), list[str]()
    graph = Graph(log)
    with kitsune.accelerate(warmup=0, device="cpu"):
        y = x * 2
        doors.capture_begin(graph)
        assert kitsune.counters()["flushed"] == {"CAPTURE": 1}
        z = y + 1
        assert not is_recorded(z) and z.tolist() == [3.0] * 3
        doors.capture_end(graph)
        w = z + 1
        assert is_recorded(w) and w.tolist() == [4.0] * 3
    assert log == ["capture_begin", "capture_end"]


@pytest.mark.parametrize("fails", ["capture_begin", "capture_end"])
def test_behind_a_capture_that_fails_it_is_recorded_again(doors: Any, fails: str) -> None:
    graph = Graph([], fails)
    with kitsune.accelerate(warmup=0, device="cpu"):
        with pytest.raises(RuntimeError, match=f"{fails} fails"):
            doors.capture_begin(graph)
            doors.capture_end(graph)
        assert is_recorded(torch.ones(3) * 2)


def test_a_graph_that_is_reset_or_begun_again_holds_nothing_up(doors: Any) -> None:
    graph = Graph([])
    with kitsune.accelerate(warmup=0, device="cpu"):
        for _ in range(2):
            doors.capture_begin(graph)
        doors.reset(graph)
        assert is_recorded(torch.ones(3) * 2)


def test_what_a_capture_may_refer_to_is_not_moved_any_more(doors: Any) -> None:
    x, graph = torch.arange(4.0), Graph([])
    with graphs():
        with kitsune.accelerate(device="cpu"):
            for k in range(N_ROUNDS):
                result: Any = (x * (k + 2.0)).sin()
                kitsune.flush()
        assert counts("replayed")[0] > 0 and lent_memory(result.cell.real) is not None
        # The context is closed by now.
        doors.capture_begin(graph)
        doors.capture_end(graph)
        address = result.cell.real.data_ptr()
        assert lent_memory(result.cell.real) is None
        before = counts("replayed", "captured")
        with kitsune.accelerate(device="cpu"):
            for k in range(N_ROUNDS):
                _ = (x * (k + 3.0)).sin()
                kitsune.flush()
        assert result.data_ptr() == address and torch.equal(result, (x * (N_ROUNDS + 1.0)).sin())
        # The region has a graph again.
        assert counts("replayed", "captured") > before


def test_a_replay_finds_what_is_pending_done_and_changes_memory(doors: Any) -> None:
    x, seen = torch.ones(3), []

    class Adds(Graph):
        def replay(self) -> None:
            with torch._C._DisableTorchDispatch():  # type: ignore[attr-defined]
                seen.append(x.tolist())
                torch.from_numpy(x.numpy()).add_(1)

    with kitsune.accelerate(warmup=0, device="cpu"):
        for k in range(4):
            x.mul_(2)
            doors.replay(Adds([]))
            assert (x + 0).tolist() == [2.0 ** (k + 2) - 1] * 3
        assert seen == [[2.0 ** (k + 2) - 2] * 3 for k in range(4)]


def test_a_replay_is_no_part_of_a_static_step(doors: Any) -> None:
    x, log = torch.ones(3), list[str]()

    @kitsune.accelerate(static=True, device="cpu")
    def step(x: torch.Tensor) -> torch.Tensor:
        doors.replay(Graph(log))
        return x * 2

    for _ in range(8):
        step(x)
    assert log == ["replay"] * 8
    assert any("captures or replays a CUDA graph of its own" in line for line in str(kitsune.explain()).splitlines())


def doubling() -> tuple[Callable[..., Any], Callable[..., Any], list[int]]:
    """A decorated function and a static one, whose Python is skipped by now; the third counts how often it is not."""
    n_python: list[int] = []

    @kitsune.accelerate(warmup=0, device="cpu")
    def decorated(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @kitsune.accelerate(static=True, device="cpu")
    def static(x: torch.Tensor) -> torch.Tensor:
        n_python.append(1)
        return x * 2

    for _ in range(8):
        static(torch.ones(3))
    assert len(n_python) < 8
    return decorated, static, n_python


def test_contexts_that_are_entered_while_the_program_captures_record_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, (decorated, static, n_python) = torch.ones(3), doubling()
    before, n = n_recorded(), len(n_python)
    with monkeypatch.context() as patch:
        patch.setattr(streams, "is_captured", lambda: True)
        for call in (decorated, static):
            assert type(call(x)) is torch.Tensor
        with kitsune.accelerate(warmup=0, device="cpu"):
            assert type(x * 2) is torch.Tensor
    assert n_recorded() == before and len(n_python) == n + 1
    assert kitsune.counters()["passed_through"]["CAPTURE"] == 3
    decorated(x)
    assert n_recorded() > before


def test_memory_is_taken_from_the_programs_pool(doors: Any) -> None:
    log: list[Any] = []
    begin = captures.pool_begin_door(lambda device, pool: log.append(("begin", pool)))
    end = captures.pool_end_door(lambda device, pool: log.append(("end", pool)))
    with kitsune.accelerate(warmup=0, device="cpu"):
        x = torch.ones(3) * 2
        begin(0, (0, 1))
        assert kitsune.counters()["flushed"] == {"CAPTURE": 1}
        begin(0, (0, 1))
        assert not is_recorded(x + 1)
        end(0, (0, 1))
        assert not is_recorded(x + 1)
        end(0, (0, 1))
        assert is_recorded(x + 1)
    assert [name for name, _ in log] == ["begin", "begin", "end", "end"]


def test_the_background_thread_rests_meanwhile() -> None:
    thread, made, begun, go = PacedThread(), list[int](), threading.Event(), threading.Event()

    def call() -> None:
        begun.set()
        go.wait(10)
        made.append(1)

    thread.submit(call)
    assert begun.wait(10)
    threading.Timer(0.05, go.set).start()
    for who in (1, 2):
        thread.pause(who)
    # The call that was being made is over, and the next one is not begun.
    assert made == [1]
    done = threading.Event()
    thread.submit(done.set)
    assert not done.wait(0.1)
    thread.go_on(1)
    thread.go_on(1)
    assert not done.wait(0.1)
    thread.go_on(2)
    assert done.wait(10)
    thread.close()


def test_a_call_that_waits_for_the_program_holds_no_capture_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paced_thread, "PATIENCE_S", 0.05)
    thread, go, begun, done = PacedThread(), threading.Event(), threading.Event(), threading.Event()

    def call() -> None:
        begun.set()
        go.wait(10)

    thread.submit(call)
    assert begun.wait(10)
    thread.pause(1)
    assert thread._in_call
    go.set()
    thread.submit(done.set)
    # It makes no other call, though.
    assert not done.wait(0.1)
    thread.go_on(1)
    assert done.wait(10)
    thread.close()


@pytest.mark.parametrize("others", [False, True, None], ids=["nobody else", "beside a graph from before", "nobody can tell"])
def test_workspaces_are_let_go_of_around_a_capture(doors: Any, others: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    log, pools = list[str](), [(0, 0), (0, 3)] if others else [(0, 0)]

    def snapshot() -> list[Any]:
        if others is None:
            raise RuntimeError("this allocator has no snapshots")
        return [{"segment_pool_id": pool} for pool in pools]

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: log.append("let go"), raising=False)
    monkeypatch.setattr(torch.cuda, "memory_snapshot", snapshot)
    workspaces._are_of_others.cache_clear()
    graph = Graph(log)
    try:
        for _ in range(2):
            doors.capture_begin(graph)
            doors.capture_end(graph)
            # What is there from now on is known.
            pools.append((0, 5))
    finally:
        workspaces._are_of_others.cache_clear()
    inside = ["capture_begin", "capture_end"]
    assert log == 2 * (inside if others else ["let go", *inside, "let go"])


# ---- on a GPU ----


@pytest.fixture
def warned() -> Iterator[None]:
    """Of gradients that are made on other streams, and of what the compiler itself uses, torch warns in eager, too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 10)).cuda()


def of_its_own(context: Any, way: str) -> list[torch.Tensor]:
    """A training of which every second step is a graph that the program has captured; returns the losses and parameters."""
    net, losses = model(), []
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, capturable=True, fused=True)
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(32, 64, generator=generator).cuda() for _ in range(2 * N_ROUNDS)]
    target = torch.randint(0, 10, (32,), generator=generator).cuda()
    graph, aside = torch.cuda.CUDAGraph(), torch.cuda.Stream()

    def step(x: torch.Tensor) -> torch.Tensor:
        loss = F.cross_entropy(net(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        return loss.detach()

    inside = kitsune.accelerate(step) if way == "decorated inside" and not isinstance(context, contextlib.nullcontext) else step
    torch.cuda.synchronize()
    with context:
        # Made in the context: its memory may be a graph's of Kitsune's.
        static = batches[0] * 1
        for k in range(6):
            static = batches[k] * 1
            losses.append(step(static))
            kitsune.flush()
        leaf = None
        if way == "leaf of another stream":
            with torch.cuda.stream(aside):
                leaf = sum((p * 1.0).sum() for p in net.parameters())
        torch.cuda.current_stream().wait_stream(aside)
        with torch.cuda.graph(graph):
            captured = inside(static)
        for k in range(6, 2 * N_ROUNDS):
            if k % 2:
                losses.append(step(batches[k] * 1))
            else:
                static.copy_(batches[k])
                graph.replay()
                losses.append(captured.clone())
        del leaf
        found = [t.clone() for t in losses]
    torch.cuda.synchronize()
    return [*found, *[p.detach().clone() for p in net.parameters()]]


@pytest.mark.gpu
@pytest.mark.usefixtures("warned")
@pytest.mark.parametrize("way", ["", "leaf of another stream", "decorated inside"])
def test_a_training_whose_step_the_program_captures(way: str) -> None:
    expected = of_its_own(contextlib.nullcontext(), way)
    kitsune.reset()
    with config.patch(fuse=False):
        got = of_its_own(kitsune.accelerate(), way)
    assert counts("replayed")[0] > 3 and n_recorded() > 0
    same = [*map(torch.equal, got, expected)]
    assert all(same), same


def graphed(context: Any) -> list[torch.Tensor]:
    net, losses = model(), []
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(32, 64, generator=generator).cuda() for _ in range(2 * N_ROUNDS)]
    target = torch.randint(0, 10, (32,), generator=generator).cuda()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)
    torch.cuda.synchronize()
    with context:
        net[0] = torch.cuda.make_graphed_callables(net[0], (batches[0].clone(),))
        net[2] = torch.cuda.make_graphed_callables(net[2], (torch.randn(32, 64, device="cuda", requires_grad=True),))
        for x in batches:
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x), target)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        found = [t.clone() for t in losses]
    torch.cuda.synchronize()
    return [*found, *[p.detach().clone() for p in net.parameters()]]


@pytest.mark.gpu
@pytest.mark.usefixtures("warned")
def test_modules_that_the_program_has_made_graphs_of() -> None:
    expected = graphed(contextlib.nullcontext())
    kitsune.reset()
    with config.patch(fuse=False):
        got = graphed(kitsune.accelerate())
    assert n_recorded() > 0 and all(map(torch.equal, got, expected))


@pytest.mark.gpu
def test_a_capture_that_breaks_off_leaves_the_program_recording() -> None:
    x = torch.ones(64, device="cuda")
    with kitsune.accelerate(warmup=0):
        y = x * 2
        with pytest.raises(ZeroDivisionError), torch.cuda.graph(torch.cuda.CUDAGraph()):
            _ = (y + 1).sum() / (1 // 0)
        z = y * 3
        assert is_recorded(z) and z.sum().item() == 6 * 64


@pytest.mark.gpu
def test_a_pool_of_the_programs_has_what_is_made_inside() -> None:
    pool, x = torch.cuda.MemPool(), torch.ones(1 << 10, device="cuda")
    with kitsune.accelerate(warmup=0):
        for _ in range(4):
            before = x * 2
            with torch.cuda.use_mem_pool(pool):
                inside = before * 3
            after = inside + 1
        # Not by the pool's own method: behind 256 pools it drops a reference that it does not have (pytorch#196366).
        of_pool = [s for s in torch.cuda.memory_snapshot() if s["segment_pool_id"] == pool.id]
        within = [(s["address"], s["address"] + s["total_size"]) for s in of_pool]
        found = [any(a <= t.data_ptr() < b for a, b in within) for t in (before, inside, after)]
        assert found == [False, True, False] and after.sum().item() == 7 << 10
    del inside


@pytest.mark.gpu
@pytest.mark.usefixtures("warned")
def test_a_compiled_function_that_captures_itself() -> None:
    def body(x: torch.Tensor) -> torch.Tensor:
        return (x * 2 + 1).relu().sum(1)

    compiled, x = torch.compile(body, mode="reduce-overhead"), torch.ones(32, 64, device="cuda")
    with kitsune.accelerate():
        for k in range(N_ROUNDS):
            # Written in the context, read by a graph.
            y = x * (k + 1.0)
            assert (compiled(y) + 1).tolist() == [64 * (2 * (k + 1.0) + 1) + 1] * 32


@pytest.mark.gpu
@pytest.mark.usefixtures("warned")
@pytest.mark.parametrize("when", ["before Kitsune", "in the context"])
def test_a_graph_of_the_programs_has_its_workspaces_for_good(when: str) -> None:
    """Products write parts of their sums into a workspace of cuBLAS's, of which the graph has the address."""
    workspaces._are_of_others.cache_clear()
    graph, stream, layer, net = torch.cuda.CUDAGraph(), torch.cuda.Stream(), nn.Linear(64, 64, device="cuda"), model()
    x, long = torch.randn(32, 64, device="cuda"), torch.randn(64, 1 << 18, device="cuda")

    def step() -> torch.Tensor:
        # Long sums of few elements, and what a layer computes.
        (grad,) = torch.autograd.grad(layer(x).square().sum(), [layer.weight])
        return grad + long @ long.T

    def capture() -> torch.Tensor:
        # As torch's notes on graphs have it: the first steps on the stream that will capture, which has a workspace from then on.
        with torch.cuda.stream(stream):
            step()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            return step()

    result = capture() if when == "before Kitsune" else x
    with kitsune.accelerate():
        result = capture() if when == "in the context" else result
        for _ in range(N_ROUNDS):
            net.zero_grad()
            net(torch.randn(32, 64, device="cuda")).square().mean().backward()
            kitsune.flush()
        assert counts("captured")[0] > 0
    # Whoever asks for memory there now has what was let go of.
    with torch.cuda.stream(stream):
        others = [torch.ones(1 << n, device="cuda") for n in range(10, 24) for _ in range(4)]
    torch.cuda.synchronize()
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(result, step())
    assert all(bool((other == 1).all()) for other in others)
    graph.reset()
    workspaces._are_of_others.cache_clear()


@pytest.mark.gpu
@pytest.mark.usefixtures("warned")
def test_a_program_that_allows_no_waiting_for_the_device_has_graphs() -> None:
    x, found = torch.arange(1024.0, device="cuda"), []
    with kitsune.accelerate():
        torch.cuda.set_sync_debug_mode("error")
        try:
            for k in range(N_ROUNDS):
                found.append((x * (k + 1.0)).sin())
                kitsune.flush()
            assert torch.cuda.get_sync_debug_mode() == 2
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert counts("replayed")[0] > 3 and not kitsune.counters()["graph_refused"]
    assert all(torch.equal(t, (x * (k + 1.0)).sin()) for k, t in enumerate(found))
