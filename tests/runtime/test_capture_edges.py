"""The program's own captures and pools: interrupts, contexts that are entered inside, threads that take turns, failures."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kitsune
from kitsune.background import thread, wait
from kitsune.config import config
from kitsune.contexts import here
from kitsune.ir import lent_memory, own, plain_times, streams
from kitsune.lazy import captures, doors as table, early_reads
from kitsune.paced_thread import PacedThread
from kitsune.runtime import CudaGraphs, frame
from kitsune.runtime.plan_thread import PlanThread, _Request, plan_thread
from tests.interrupts import interrupted_at
from tests.runtime.repeated import counts, graphs
from tests.runtime.test_captures import Graph, doors, doubling, is_recorded, n_recorded  # noqa: F401 (a fixture)

pytestmark = pytest.mark.usefixtures("fresh")
POOL = (0, 1)
FILES = ("lazy/captures.py", "lazy/paused.py", "standing_aside.py", "ir/plain_times.py", "paced_thread.py")


@pytest.fixture
def pool() -> Iterator[Any]:
    """The doors of a pool of the program's, and what was asked of it."""
    log: list[str] = []
    begin = captures.pool_begin_door(lambda device, pool: log.append("begin"))
    end = captures.pool_end_door(lambda device, pool: log.append("end"))

    @contextlib.contextmanager
    def used(number: Any = POOL) -> Iterator[None]:
        begin(0, number)
        try:
            yield
        finally:
            end(0, number)

    yield type("Pool", (), {"begin": staticmethod(begin), "end": staticmethod(end), "used": staticmethod(used), "log": log})
    assert not captures._under_way and not plain_times._threads


def nothing_is_left() -> bool:
    paused = [pipeline.recorder.paused for pipeline in here.depth]
    return paused == [0] and not thread.pauses and not captures._under_way and not plain_times.is_plain()


@pytest.mark.parametrize("what", ["capture", "pool"])
def test_an_interrupt_at_any_line_leaves_the_program_recording(doors: Any, pool: Any, what: str) -> None:  # noqa: F811
    log: list[str] = []
    graph = Graph(log)
    begin = (lambda: doors.capture_begin(graph)) if what == "capture" else lambda: pool.begin(0, POOL)
    end = (lambda: doors.capture_end(graph)) if what == "capture" else lambda: pool.end(0, POOL)
    log = log if what == "capture" else pool.log
    with kitsune.accelerate(warmup=0, device="cpu"):
        _ = torch.ones(3) * 2
        k = 1
        while interrupted_at(k, begin, *FILES):
            assert nothing_is_left(), k
            k += 1
        n_lines, k = k, 1
        assert n_lines > 20
        while True:
            n_ended = sum("end" in asked for asked in log)
            was_interrupted = interrupted_at(k, end, *FILES)
            if sum("end" in asked for asked in log) == n_ended:
                # Before anything was begun.
                end()
            assert nothing_is_left(), k
            if not was_interrupted:
                break
            begin()
            k += 1
        assert k > 20
        assert is_recorded(torch.ones(3) * 2)


def test_contexts_that_are_entered_while_a_pool_is_used_record_nothing(pool: Any) -> None:
    x, others, (decorated, static, n_python) = torch.ones(3), list[bool](), doubling()

    def other() -> None:
        with kitsune.accelerate(warmup=0, device="cpu"):
            others.append(is_recorded(x * 2))

    n, before = len(n_python), n_recorded()
    with pool.used():
        for call in (decorated, static):
            assert type(call(x)) is torch.Tensor
        with kitsune.accelerate(warmup=0, device="cpu") as context:
            assert type(x * 2) is torch.Tensor
        context.__enter__()
        assert n_recorded() == before and len(n_python) == n + 1
        runner = threading.Thread(target=other)
        runner.start()
        runner.join()
    # It was left to plain PyTorch when it was entered, and stays so.
    assert type(x * 2) is torch.Tensor
    context.__exit__(None, None, None)
    assert others == [True] and kitsune.counters()["passed_through"]["CAPTURE"] == 4
    with kitsune.accelerate(warmup=0, device="cpu"):
        assert is_recorded(x * 2)


def test_a_context_that_is_left_inside_records_when_it_is_entered_again(doors: Any, pool: Any) -> None:  # noqa: F811
    graph = Graph([])
    for begin, end in (
        (lambda: doors.capture_begin(graph), lambda: doors.capture_end(graph)),
        (lambda: pool.begin(0, POOL), lambda: pool.end(0, POOL)),
    ):
        with kitsune.accelerate(warmup=0, device="cpu"):
            begin()
            assert not is_recorded(torch.ones(3) * 2)
        end()
        with kitsune.accelerate(warmup=0, device="cpu"):
            assert is_recorded(torch.ones(3) * 2)


def test_what_is_disabled_inside_and_enabled_behind_or_the_other_way_round(doors: Any) -> None:  # noqa: F811
    graph, disabled = Graph([]), kitsune.disable()
    with kitsune.accelerate(warmup=0, device="cpu"):
        doors.capture_begin(graph)
        disabled.__enter__()
        doors.capture_end(graph)
        assert not is_recorded(torch.ones(3) * 2)
        disabled.__exit__(None, None, None)
        assert is_recorded(torch.ones(3) * 2)
        disabled.__enter__()
        doors.capture_begin(graph)
        disabled.__exit__(None, None, None)
        assert not is_recorded(torch.ones(3) * 2)
        kitsune.reset()
        assert not is_recorded(torch.ones(3) * 2)
        doors.capture_end(graph)
        assert is_recorded(torch.ones(3) * 2)


def test_a_stance_that_changes_inside_turns_nothing_on_until_the_capture_is_over(
    doors: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graph, p = Graph([]), nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([p], lr=0.5)
    p.grad = torch.ones(3)
    with kitsune.accelerate(warmup=0, device="cpu"):
        kitsune.set_stance("force_eager")
        assert not is_recorded(torch.ones(3) * 2)
        with monkeypatch.context() as patch:
            patch.setattr(streams, "is_captured", lambda: True)
            doors.capture_begin(graph)
            kitsune.set_stance("default")
            optimizer.step()
            assert not is_recorded(torch.ones(3) * 2)
            doors.capture_end(graph)
        optimizer.step()
        assert is_recorded(torch.ones(3) * 2)
    assert p.tolist() == [0.0] * 3


def test_a_context_that_is_left_while_the_program_captures_is_no_step_to_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[bool] = []
    with config.patch(gate=True):
        for captured in (False, True):
            context = kitsune.accelerate(warmup=0, device="cpu")
            context.__enter__()
            (pipeline,) = here.depth
            monkeypatch.setattr(pipeline.gate, "end_of_context", lambda captured=captured: told.append(captured))
            monkeypatch.setattr(streams, "is_captured", lambda captured=captured: captured)
            context.__exit__(None, None, None)
    assert told == [False]


def test_a_capture_that_was_begun_already_goes_on(doors: Any) -> None:  # noqa: F811
    graph = Graph([])
    with kitsune.accelerate(warmup=0, device="cpu"):
        doors.capture_begin(graph)
        graph.fails = "capture_begin"
        with pytest.raises(RuntimeError, match="capture_begin fails"):
            doors.capture_begin(graph)
        assert not is_recorded(torch.ones(3) * 2)
        doors.capture_end(graph)
        assert is_recorded(torch.ones(3) * 2)


def test_captures_that_overlap_end_each_for_itself(doors: Any) -> None:  # noqa: F811
    one, other = Graph([]), Graph([])
    with kitsune.accelerate(warmup=0, device="cpu"):
        doors.capture_begin(one)
        doors.capture_begin(other)
        doors.capture_end(one)
        assert not is_recorded(torch.ones(3) * 2) and thread.pauses
        # Ended in another thread.
        runner = threading.Thread(target=lambda: doors.capture_end(other))
        runner.start()
        runner.join()
        assert is_recorded(torch.ones(3) * 2) and not thread.pauses


def test_threads_that_use_one_pool_end_their_own_use(pool: Any) -> None:
    begun, ended, seen = threading.Event(), threading.Event(), list[bool]()

    def other() -> None:
        with kitsune.accelerate(warmup=0, device="cpu"), pool.used():
            begun.set()
            assert ended.wait(10)
            seen.append(is_recorded(torch.ones(3) * 2))

    with kitsune.accelerate(warmup=0, device="cpu"):
        runner = threading.Thread(target=other)
        with pool.used():
            runner.start()
            assert begun.wait(10)
        assert is_recorded(torch.ones(3) * 2)
        ended.set()
        runner.join()
    assert seen == [False]


def test_a_use_of_a_pool_that_fails_or_is_ended_elsewhere_holds_nothing_up(pool: Any) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("no memory")

    with kitsune.accelerate(warmup=0, device="cpu"):
        with pytest.raises(RuntimeError, match="no memory"):
            captures.pool_begin_door(fails)(0, POOL)
        assert nothing_is_left()
        pool.begin(0, POOL)
        runner = threading.Thread(target=lambda: pool.end(0, POOL))
        runner.start()
        runner.join()
        assert nothing_is_left()
        pool.begin(0, POOL)
        with pytest.raises(RuntimeError, match="no memory"):
            captures.pool_end_door(fails)(0, POOL)
        assert nothing_is_left()


def test_all_ways_to_capture_and_to_use_a_pool_are_doors() -> None:
    with kitsune.accelerate(device="cpu"):
        for graph in filter(None, (torch.cuda.CUDAGraph, getattr(torch.accelerator, "Graph", None))):
            for name in ("capture_begin", "capture_end", "reset", "replay"):
                assert getattr(graph, name).__code__.co_filename == captures.__file__
        for owner in (torch.cuda.memory, torch._C):
            for name in ("_cuda_beginAllocateCurrentThreadToPool", "_cuda_endAllocateToPool"):
                assert getattr(owner, name).__code__.co_filename == captures.__file__
    assert len(table._CAPTURES) >= 4 and len(table._POOLS) == 4


def test_the_background_rests_whichever_thread_captures(doors: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    with kitsune.accelerate(warmup=0, device="cpu"):
        seen, forgets = list[bool](), list[bool]()
        (pipeline,) = here.depth
        stand_aside: Any = pipeline.recorder.stand_aside

        def spied(ends: Any, forgets_its_graphs: bool) -> None:
            forgets.append(forgets_its_graphs)
            stand_aside(ends, forgets_its_graphs)

        monkeypatch.setattr(pipeline.recorder, "stand_aside", spied)

        def capture() -> None:
            graph = Graph([])
            doors.capture_begin(graph)
            seen.append(bool(thread.pauses))
            doors.capture_end(graph)
            seen.append(bool(thread.pauses))

        runner = threading.Thread(target=capture)
        runner.start()
        runner.join()
        # Its own recording goes on.
        assert is_recorded(torch.ones(3) * 2)
        capture()
    assert seen == [True, False] * 2
    # Graphs are destroyed by the thread that replays them.
    assert forgets == [False, True]


def test_a_call_that_a_capture_waits_for_does_not_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    paced, begun, done, rests = PacedThread(), threading.Event(), list[int](), list[bool]()
    monkeypatch.setattr(paced, "_rest", lambda worked: rests.append(bool(paced.pauses)))

    def call() -> None:
        begun.set()
        while not paced.pauses:
            time.sleep(0.001)
        until = time.thread_time() + 0.02
        while time.thread_time() < until:
            sum(divmod(n, 3)[0] for n in range(100))
        done.append(1)

    paced.submit(call)
    assert begun.wait(10)
    paced.pause(1)
    assert done and not any(rests)
    paced.go_on(1)
    paced.close()


def test_a_thread_that_is_paused_can_be_closed_and_asked() -> None:
    paced, made = PacedThread(), list[int]()
    paced.pause(1)
    paced.submit(lambda: made.append(1))
    time.sleep(0.05)
    assert not made
    began = time.monotonic()
    paced.close()
    # It takes 5 s where it does not hear of it.
    assert time.monotonic() - began < 4
    thread.pause(1)
    try:
        before = thread.n_waiting
        began = time.monotonic()
        kitsune.background.soon(lambda: made.append(2))
        assert not wait(30) and time.monotonic() - began < 20 and thread.n_waiting == before
    finally:
        thread.go_on(1)
    assert wait(20) and 2 in made


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_in_a_forked_child_nobody_is_paused() -> None:
    paced = PacedThread()
    paced.pause(1)
    pid = os.fork()
    if not pid:
        done = threading.Event()
        paced.submit(done.set)
        os._exit(0 if done.wait(10) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    paced.go_on(1)


def test_what_has_ended_resumes_nobody_again() -> None:
    with kitsune.accelerate(warmup=0, device="cpu"), contextlib.ExitStack() as disabled:
        (pipeline,) = here.depth
        aside = captures.Aside(POOL)
        aside.of_pool()
        aside.end()
        disabled.enter_context(kitsune.disable())
        aside.end()
        assert pipeline.recorder.paused == 1


def test_what_the_thread_of_plans_was_asked_is_over_before_a_capture(doors: Any) -> None:  # noqa: F811
    asked: list[int] = []
    with kitsune.accelerate(warmup=0, device="cpu"):
        (pipeline,) = here.depth
        plan_thread.start()
        plan_thread._requests.put(_slow(asked))
        doors.capture_begin(graph := Graph([]))
        assert asked == [1]
        doors.capture_end(graph)
    assert pipeline.recorder.paused == 0


def _slow(asked: list[int]) -> Any:
    def call() -> None:
        time.sleep(0.2)
        asked.append(1)

    return _Request(call)


def test_a_plan_that_waits_for_the_program_holds_no_capture_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kitsune.runtime.plan_thread, "PATIENCE_S", 0.05)
    plans, go = PlanThread(), threading.Event()
    plans.settle()
    plans.start()
    plans._requests.put(_Request(lambda: go.wait(20)))
    began = time.monotonic()
    plans.settle()
    assert time.monotonic() - began < 10
    go.set()
    plans.close()


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "in a context"])
def test_an_interrupt_where_nothing_is_filled_leaves_filling_on(inside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    type_ = kitsune.ir.type_of(torch.ones(3))
    n_flushed: dict[str, int] = {}

    def trace(frame_: Any, event: str, _: Any) -> Any:
        if frame_.f_code is not frame.unfilled.__code__:
            return None
        if event == "line" and not torch._C._get_deterministic_fill_uninitialized_memory():
            raise KeyboardInterrupt
        return trace

    torch.use_deterministic_algorithms(True)
    try:
        with kitsune.accelerate(warmup=0, device="cpu") if inside else contextlib.nullcontext():
            x = torch.ones(3) * 2
            frame.unfilled(type_)
            # What Kitsune does is no door.
            n_flushed = kitsune.counters()["flushed"]
            before = sys.gettrace()
            sys.settrace(trace)
            try:
                with pytest.raises(KeyboardInterrupt):
                    frame.unfilled(type_)
            finally:
                sys.settrace(before)
            assert torch._C._get_deterministic_fill_uninitialized_memory()
            assert x.tolist() == [2.0] * 3
    finally:
        torch.use_deterministic_algorithms(False)
        torch._C._set_deterministic_fill_uninitialized_memory(True)
    assert not n_flushed


# ---- values around a replay ----


class Replayed(Graph):
    """What a graph does when it is replayed, past the dispatcher."""

    def __init__(self, work: Callable[[], None]) -> None:
        super().__init__([])
        self.work = work

    def replay(self) -> None:
        with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction(), torch.no_grad():  # type: ignore[attr-defined]
            self.work()


def scale(factor: float, *tensors: torch.Tensor) -> None:
    """Past all doors."""
    for tensor in tensors:
        array = torch._C.TensorBase.numpy(tensor)
        array *= factor


def trained(replay: Callable[[Any], None], context: Any, way: str) -> list[torch.Tensor]:
    """A training in the midst of whose steps a graph writes weights, an input, or what is read as a number."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.125, momentum=0.5)
    losses, static = list[Any](), torch.ones(3, 4)
    plain = [p.detach() for p in net.parameters()]
    writes_input = Replayed(lambda: scale(0.5, static))
    writes_weights = Replayed(lambda: scale(0.75, *plain))
    autocast = torch.autocast("cpu", torch.bfloat16) if "autocast" in way else contextlib.nullcontext()
    with context:
        for k in range(10):
            optimizer.zero_grad()
            with autocast:
                hidden = net[:2](static)
                if "weights" in way and k % 2:
                    replay(writes_weights)
                if "input" in way:
                    replay(writes_input)
                again = net[:2](static) if "again" in way else hidden
                loss = F.cross_entropy(net[2](again + hidden), torch.tensor([0, 1, 0]))
            if "item" in way:
                losses.append(loss.item())
                replay(Replayed(lambda: None))
                losses.append(loss.item())
            if "weights" not in way:
                loss.backward()
                if "behind" in way:
                    replay(writes_weights)
                optimizer.step()
                if "weight read" in way:
                    losses.append(net[2].bias.sum().item())
                    replay(writes_weights)
                    losses.append(net[2].bias.sum().item())
            losses.append(loss.detach())
        found = [torch.as_tensor(t).clone() for t in losses]
    return [*found, *[p.detach().clone() for p in net.parameters()]]


WAYS = (
    "input",
    "input again item",
    "behind",
    "behind weight read",
    "autocast input again",
    "autocast weights again",
    "autocast weights",
    "autocast behind item",
    "weights again",
)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("warmup", [0, 1])
def test_values_around_a_replay_are_eagers(doors: Any, way: str, warmup: int) -> None:  # noqa: F811
    expected = trained(lambda graph: graph.replay(), contextlib.nullcontext(), way)
    got = trained(doors.replay, kitsune.accelerate(warmup=warmup, device="cpu"), way)
    assert n_recorded() > 0
    same = [*map(torch.equal, got, expected)]
    assert all(same), same


@pytest.mark.parametrize("reads", [False, True], ids=["pending", "read before"])
@pytest.mark.parametrize("graded", [False, True], ids=["no_grad", "graded"])
@pytest.mark.parametrize("warmup", [0, 1])
def test_behind_a_replay_that_writes_weights_autocast_has_the_casts_of_before(
    doors: Any,  # noqa: F811
    warmup: int,
    graded: bool,
    reads: bool,
) -> None:
    def forwards(replay: Callable[[Any], None], context: Any) -> list[torch.Tensor]:
        torch.manual_seed(0)
        layer, x, found = nn.Linear(4, 8), torch.randn(3, 4), list[torch.Tensor]()
        weight = layer.weight.detach()
        writes = Replayed(lambda: scale(0.75, weight))
        with context, torch.set_grad_enabled(graded):
            for _ in range(10):
                with torch.autocast("cpu", torch.bfloat16):
                    found.append(layer(x))
                    if reads:
                        found[-1].sum().item()
                    replay(writes)
                    found.append(layer(x))
                found.append(layer(x))
            return [t.detach().clone() for t in found]

    expected = forwards(lambda graph: graph.replay(), contextlib.nullcontext())
    got = forwards(doors.replay, kitsune.accelerate(warmup=warmup, device="cpu"))
    assert torch.equal(expected[0], expected[1]) and not torch.equal(expected[0], expected[3])
    same = [*map(torch.equal, got, expected)]
    assert all(same), same


def test_what_was_read_early_is_read_again_behind_a_replay(doors: Any) -> None:  # noqa: F811
    for fails in ("", "replay"):
        before = early_reads._last_change
        with contextlib.suppress(RuntimeError):
            doors.replay(Graph([], fails))
        assert early_reads._last_change > before


@pytest.mark.parametrize("breaks", [False, True], ids=["captured", "breaks off"])
def test_what_a_capture_waits_for_is_nothing_to_tell_the_program_of(breaks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A region whose first capture came under `torch.cuda.set_sync_debug_mode("error")` was launched anew each time for good."""
    modes, inside, x = [2], list[int](), torch.ones(3)
    monkeypatch.setattr(torch._C, "_cuda_get_sync_debug_mode", lambda: modes[-1], raising=False)
    monkeypatch.setattr(torch._C, "_cuda_set_sync_debug_mode", modes.append, raising=False)
    with graphs() as repeater:
        record = repeater.record

        def watched(*args: Any) -> Any:
            inside.append(modes[-1])
            if breaks:
                raise RuntimeError("the capture breaks off")
            return record(*args)

        monkeypatch.setattr(repeater, "record", watched)
        with kitsune.accelerate(device="cpu"):
            for _ in range(6):
                _ = (x * 2).sin()
                with monkeypatch.context() as patch:
                    patch.setattr(torch.cuda, "is_initialized", lambda: True)
                    patch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: False, raising=False)
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore", kitsune.KitsuneWarning)
                        kitsune.flush()
    assert inside == [0] and modes == [2, 0, 2]


FIRST_IN_A_POOL = """
import torch
log = []
torch.cuda.memory._cuda_beginAllocateCurrentThreadToPool = lambda device, pool: log.append("begin")
torch.cuda.memory._cuda_endAllocateToPool = lambda device, pool: log.append("end")
import kitsune
from kitsune.lazy import LazyTensor

def is_recorded():
    with kitsune.accelerate(warmup=0, device="cpu"):
        return type(torch.ones(3) * 2) is LazyTensor

torch.cuda.memory._cuda_beginAllocateCurrentThreadToPool(0, (0, 1))
assert not is_recorded()
torch.cuda.memory._cuda_endAllocateToPool(0, (0, 1))
assert is_recorded() and log == ["begin", "end"]
"""


def test_the_first_context_of_a_process_may_be_opened_in_a_pool() -> None:
    subprocess.run([sys.executable, "-c", FIRST_IN_A_POOL], check=True, timeout=120)


def test_what_another_thread_has_made_stays_for_a_graph_of_this_one(doors: Any) -> None:  # noqa: F811
    x, graph, made, go, found = torch.arange(4.0), Graph([]), threading.Event(), threading.Event(), dict[str, Any]()

    def train() -> None:
        with kitsune.accelerate(device="cpu"):
            for k in range(8):
                found["held"] = (x * (k + 2.0)).sin()
                kitsune.flush()
            found["lent"] = lent_memory(found["held"].cell.real)
            made.set()
            go.wait(20)
            before = counts("replayed", "captured")
            for k in range(8):
                found["later"] = (x * (k + 3.0)).sin()
                kitsune.flush()
            found["since"] = [b - a for a, b in zip(before, counts("replayed", "captured"), strict=True)]

    with graphs():
        thread = threading.Thread(target=train)
        thread.start()
        assert made.wait(20) and found["lent"] is not None
        address = found["held"].cell.real.data_ptr()
        with kitsune.accelerate(device="cpu"):
            doors.capture_begin(graph)
            doors.capture_end(graph)
        go.set()
        thread.join()
        real = found["held"].cell.real
        assert real.data_ptr() == address and torch.equal(real, (x * 9.0).sin())
        # It has another graph by now.
        assert found["since"][0] > 0 and found["since"][1] == 1
        assert torch.equal(found["later"], (x * 10.0).sin())
        # Nor does who wants memory of its own move it.
        own(real)
        assert real.data_ptr() == address


def test_nothing_is_captured_by_a_thread_that_uses_a_pool(pool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may read what is pending in a thread that uses none."""
    asked: list[torch.device] = []
    monkeypatch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: False, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
    monkeypatch.setattr(streams, "use", asked.append)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: index)
    graphs_of_device = CudaGraphs(torch.device("cuda", 0))
    assert graphs_of_device.follow_stream()
    pool.begin(0, POOL)
    assert not graphs_of_device.follow_stream()
    other: list[bool] = []
    thread = threading.Thread(target=lambda: other.append(graphs_of_device.follow_stream()))
    thread.start()
    thread.join()
    pool.end(0, POOL)
    assert other == [True] and graphs_of_device.follow_stream()


def test_an_end_that_fails_ends_the_others_all_the_same(doors: Any) -> None:  # noqa: F811
    """As a device does that a capture has left with an error."""

    def fails() -> None:
        raise RuntimeError("the device has failed")

    graph = Graph([])
    with kitsune.accelerate(warmup=0, device="cpu"):
        doors.capture_begin(graph)
        with pytest.raises(RuntimeError, match="the device has failed"):
            captures._under_way[-1]._ends[-1] = fails
            doors.capture_end(graph)
        assert not thread.pauses and is_recorded(torch.ones(3) * 2)
        assert not captures._under_way
