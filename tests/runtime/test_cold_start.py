"""Cold start without a device: regions run unfused while plans and kernels are made, and by plan once they are there."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

import kitsune
from kitsune import background, coming, plan_files, running
from kitsune.backends import Backend
from kitsune.codegen import WorkerFailed
from kitsune.config import KitsuneWarning, config
from kitsune.ir import Graph, Launch, Pending
from kitsune.lazy import learning
from kitsune.paced_thread import PacedThread
from kitsune.running import PLAN_AFTER
from kitsune.runtime import ThreadPlans
from tests.runtime.backends import assert_equal, chain, lazily, loop, runner
from tests.runtime.checked import forget
from tests.runtime.repeated import Repeater, WalkInGraph, counts
from tests.runtime.test_capture import train
from tests.runtime.test_real_plans import Walk

SECONDS = 60.0


class Workers:
    """Programs by launch name, ready when the test says so."""

    def __init__(self) -> None:
        self.asked: dict[str, Future[None]] = {}
        self.lock = threading.Lock()
        self.hold = True
        self.n_expected = 0
        # What comes of programs instead of code.
        self.error: Exception | None = None

    def ask(self, name: str) -> Future[None]:
        with self.lock:
            future = self.asked.setdefault(name, Future())
            if not self.hold and not future.done():
                self._settle(future)
            return future

    def expect(self) -> None:
        self.n_expected += 1

    def release(self) -> None:
        with self.lock:
            self.hold = False
            for future in self.asked.values():
                if not future.done():
                    self._settle(future)
        assert kitsune.wait_for_kernels(SECONDS)

    def _settle(self, future: Future[None]) -> None:
        if self.error is not None:
            future.set_exception(self.error)
        else:
            future.set_result(None)


class Compiling(Walk):
    """A launch whose program comes from workers."""

    def __init__(self, launch: Launch, workers: Workers) -> None:
        super().__init__(launch)
        self.name, self.workers = launch.name, workers

    def start(self, address: Any, scalars: list[float], stream: int) -> None:
        future = self.workers.ask(self.name)
        if not future.done():
            raise Pending(self.name)
        future.result()
        super().start(address, scalars, stream)


@contextlib.contextmanager
def cold(graphs: bool = False) -> Iterator[tuple[Workers, Repeater]]:
    """New pipelines on the CPU have workers under the test's control, and graphs if wanted."""
    workers, repeater = Workers(), Repeater()

    def in_graph(launch: Launch, usable: Compiling, table: Any) -> WalkInGraph:
        if not workers.ask(launch.name).done():
            raise Pending(launch.name)
        return WalkInGraph(launch, table)

    warm = lambda launch, made: [workers.ask(made.name)]  # noqa: E731
    found = Backend("sm_90", lambda launch: Compiling(launch, workers), in_graph, warm, workers.expect)
    with pytest.MonkeyPatch.context() as patch, config.patch(compile_workers=1):
        patch.setattr("kitsune.running.backend_of", lambda device: found)
        if graphs:
            patch.setattr("kitsune.running.recorder_of", lambda device: repeater)
        forget()
        try:
            yield workers, repeater
        finally:
            # Also of a test that fails: the next one would wait for them.
            workers.release()
    forget()


def idle() -> bool:
    """Wait until the background thread has done what it was asked for."""
    done = threading.Event()
    background.thread.submit(done.set, rank=9)
    return done.wait(SECONDS)


def planned() -> bool:
    """Are all plans made, whatever has become of their kernels? Has them made and waits for that."""
    kitsune.wait_for_kernels(0)
    return idle()


def step() -> torch.Tensor:
    with lazily():
        return chain()


def test_a_region_runs_unfused_until_its_kernels_are_there() -> None:
    expected = chain()
    with cold() as (workers, _):
        for n in range(1, 4):
            assert torch.equal(step(), expected) and counts("kernels", "unfused") == [0, n]
        assert planned() and counts("compiling") == [len(workers.asked)] == [1]
        assert "3 runs unfused while kernels were compiled, 1 kernels still in work" in str(kitsune.explain())
        assert not kitsune.wait_for_kernels(0.01)
        workers.release()
        for n in (1, 2):
            assert torch.equal(step(), expected) and counts("kernels", "unfused", "compiling") == [n, 3, 0]
        assert not kitsune.explain().mended


def test_only_what_comes_back_is_planned_and_after_its_capture() -> None:
    with cold(graphs=True) as (workers, _):
        for n in range(1, PLAN_AFTER + 1):
            assert idle() and not workers.asked and counts("captured") == [n > 2]
            assert torch.equal(step(), chain()) and counts("unfused") == [n]
        # Two steps behind the capture, which have enough to do themselves.
        assert idle() and len(workers.asked) == 1 and counts("captured", "replayed") == [1, 3]


def test_while_kernels_are_on_their_way_libraries_make_their_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[Graph] = []
    n_left: list[int] = []
    monkeypatch.setattr(ThreadPlans, "needed", lambda self, graph: (graphs.append(graph), [*graph.ops, *graph.ops][:3])[1])
    monkeypatch.setattr(ThreadPlans, "go_on", lambda self, ops: (ops.pop(), n_left.append(len(ops))))
    with cold() as (workers, _):
        for n in range(1, PLAN_AFTER + 3):
            assert torch.equal(step(), chain()) and idle() and counts("unfused") == [n]
            assert len(n_left) == max(n - PLAN_AFTER, 0)
        for future in workers.asked.values():
            workers._settle(future)
        # Its kernels are there, and one is left that would be made in the middle of a step.
        assert torch.equal(step(), chain()) and counts("kernels", "unfused") == [0, PLAN_AFTER + 3] and n_left == [2, 1, 0]
        assert torch.equal(step(), chain()) and counts("kernels") == [1] and n_left == [2, 1, 0]
        assert len(graphs) == 1


def test_who_waits_for_kernels_has_them_in_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ThreadPlans, "needed", lambda self, graph: [*graph.ops])
    made: list[int] = []
    monkeypatch.setattr(ThreadPlans, "go_on", lambda self, ops: None)
    monkeypatch.setattr(ThreadPlans, "make_all", lambda self, ops: made.append(len(ops)))
    with cold() as (workers, _):
        workers.hold = False
        for _ in range(4):
            step()
            assert idle()
        assert counts("kernels") == [0] and not any(made)
        # Whoever waits makes what his thread needs for them, so that no step does.
        assert kitsune.wait_for_kernels(SECONDS) and max(made) > 0
        assert torch.equal(step(), chain()) and counts("kernels") == [1]


def test_another_thread_that_waits_makes_nothing_for_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setattr(ThreadPlans, "needed", lambda self, graph: [*graph.ops])
    monkeypatch.setattr(ThreadPlans, "go_on", lambda self, ops: None)
    monkeypatch.setattr(ThreadPlans, "make_all", lambda self, ops: made.append(len(ops)))
    with cold() as (workers, _):
        workers.hold = False
        for _ in range(4):
            step()
            assert idle()
        other = threading.Thread(target=kitsune.wait_for_kernels, args=(SECONDS,))
        other.start()
        other.join()
        assert not made and torch.equal(step(), chain()) and counts("kernels") == [1]


def test_no_step_waits_for_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    go, plan = threading.Event(), coming.show_plan

    def slow(*given: Any, **options: Any) -> Any:
        assert go.wait(SECONDS)
        return plan(*given, **options)

    monkeypatch.setattr(coming, "show_plan", slow)
    with cold() as (workers, _):
        workers.hold = False
        for n in range(1, 9):
            assert torch.equal(step(), chain()) and counts("kernels", "unfused") == [0, n]
        go.set()
        assert kitsune.wait_for_kernels(SECONDS) and torch.equal(step(), chain()) and counts("kernels") == [1]


def test_without_workers_the_first_run_is_by_plan() -> None:
    with cold() as (workers, _), config.patch(compile_workers=0):
        workers.hold = False
        assert torch.equal(step(), chain()) and counts("kernels", "unfused") == [1, 0]


def test_training_leaves_what_eager_leaves_whenever_the_kernels_come() -> None:
    for late in (False, True):
        with cold() as (workers, _):
            workers.hold = late
            expected = loop(kitsune.disable(), 6)
            assert_equal(loop(lazily(), 6), expected)
            workers.release()
            assert_equal(loop(lazily(), 6), expected)
            assert counts("kernels")[0] > 0 and not kitsune.explain().mended


@pytest.mark.parametrize("fuse", [True, False])
def test_graphs_are_captured_unfused_first_and_again_when_the_kernels_are_there(fuse: bool) -> None:
    expected = train(kitsune.disable(), steps=24)
    with cold(graphs=True) as (workers, repeater), config.patch(fuse=fuse):
        assert_equal(train(lazily(), steps=24), expected)
        assert counts("kernels") == [0]
        workers.release()
        replayed, refused = counts("replayed", "graph_refused")
        assert not refused
        alive = repeater.n_alive
        assert_equal(train(lazily(), steps=24), expected)
        assert counts("replayed")[0] > replayed and not counts("graph_refused")[0]
        assert repeater.n_alive <= 4 >= alive, "graphs of what is not run any more were kept"
        assert not kitsune.explain().mended


def test_a_region_whose_numbers_stay_is_replayed_before_its_kernels_are_there() -> None:
    x, w = torch.randn(8, 4), torch.randn(4, 4)

    def run() -> list[torch.Tensor]:
        out = []
        for _ in range(6):
            with lazily():
                out.append(((x @ w + 1) * 0.5).abs().sum())
        return out

    with kitsune.disable():
        expected = run()[:1] * 6
    with cold(graphs=True) as (workers, repeater):
        assert_equal(run(), expected)
        captured, replayed = counts("captured", "replayed")
        assert captured == 1 and replayed >= 3 and repeater.n_alive == 1
        workers.release()
        assert_equal(run(), expected)
        kernels, captured, again = counts("kernels", "captured", "replayed")
        # A capture and its replays, with no ordinary run by plan before it; the first graph is gone.
        assert kernels == 6 and captured == 2 and again - replayed == 6 and repeater.n_alive == 1


@pytest.mark.parametrize("n_failures", [1, 2])
def test_a_capture_that_fails_at_once_is_tried_again_after_an_ordinary_run(n_failures: int) -> None:
    x, w = torch.randn(8, 4), torch.randn(4, 4)

    def run(n: int) -> list[torch.Tensor]:
        out = []
        for _ in range(n):
            with lazily():
                out.append(((x @ w + 1) * 0.5).abs().sum())
        return out

    with kitsune.disable():
        (expected,) = run(1)
    with cold(graphs=True) as (workers, repeater):
        run(6)
        workers.release()
        for k in range(n_failures):
            repeater.broken["record"] = RuntimeError("not while a graph is captured")
            with pytest.warns(KitsuneWarning, match="cannot be replayed") if k else contextlib.nullcontext():
                assert_equal(run(1), [expected])
            assert counts("captured") == [1] and bool(kitsune.explain().mended) is bool(k)
        repeater.broken.clear()
        assert_equal(run(3), 3 * [expected])
        assert counts("captured", "kernels") == [1 if n_failures > 1 else 2, n_failures + 3]


def test_an_input_that_was_copied_before_is_copied_still_and_keeps_nothing_back() -> None:
    w, batches = torch.randn(4, 4), [torch.full((8, 4), float(k)) for k in range(12)]

    def run(x: torch.Tensor) -> torch.Tensor:
        with lazily():
            return ((x @ w + 1) * 0.5).abs()

    with kitsune.disable():
        expected = [run(x) for x in batches]
    with cold(graphs=True) as (workers, _):
        assert_equal([run(x) for x in batches[:8]], expected[:8])
        captured, replayed = counts("captured", "replayed")
        workers.release()
        assert_equal([run(x) for x in batches[8:]], expected[8:])
        assert counts("captured", "replayed", "graph_missed") == [captured + 1, replayed + 4, {}] and captured == 1


def test_an_input_that_is_elsewhere_then_is_copied_from_there_on() -> None:
    w = torch.randn(4, 4)

    def run(x: torch.Tensor) -> torch.Tensor:
        with lazily():
            return ((x @ w + 1) * 0.5).abs().sum()

    x, other = torch.ones(8, 4), torch.full((8, 4), 2.0)
    with kitsune.disable():
        expected = [run(x), run(other)]
    with cold(graphs=True) as (workers, _):
        assert_equal([run(x) for _ in range(6)], 6 * expected[:1])
        workers.release()
        assert_equal([run(other), run(x), run(other), run(x)], 2 * [expected[1], expected[0]])
        assert counts("captured", "graph_missed") == [2, {}]


def test_a_kernel_that_does_not_compile_is_reported_once_and_run_by_ops() -> None:
    expected = chain()
    with cold() as (workers, _):
        step()
        workers.error = RuntimeError("no such instruction")
        workers.release()
        with pytest.warns(KitsuneWarning, match="cannot be used.*no such instruction") as said:
            for _ in range(3):
                assert torch.equal(step(), expected)
        assert len(said) == len(kitsune.explain().mended) == 1


def test_a_worker_that_fails_leaves_the_region_unfused_with_a_sentence() -> None:
    expected = chain()
    with cold() as (workers, _):
        step()
        workers.error = WorkerFailed("A compile worker died (exit status 3).")
        workers.release()
        with pytest.warns(KitsuneWarning, match="stays unfused.*died.*KITSUNE_COMPILE_WORKERS=0") as said:
            for _ in range(3):
                assert torch.equal(step(), expected)
        assert len(said) == len(kitsune.explain().mended) == 1
        assert counts("kernels", "unfused", "compiling") == [0, 1, 0]


def test_a_variant_that_nobody_thought_of_runs_by_ops_until_it_is_there() -> None:
    expected = chain()
    with cold() as (workers, _):
        step()
        workers.release()
        (name,) = workers.asked
        workers.asked[name] = Future()
        workers.hold = True
        for _ in range(2):
            assert torch.equal(step(), expected)
        assert not kitsune.explain().mended
        workers.asked[name].set_result(None)
        starts = runner().executor.broken
        assert torch.equal(step(), expected) and not starts


@contextlib.contextmanager
def plans_in(folder: Path) -> Iterator[None]:
    """Plans are kept there, also those of a few operators."""
    with pytest.MonkeyPatch.context() as patch, config.patch(cache_dir=str(folder), verify=False):
        patch.setattr(plan_files, "WORTH", 1)
        yield


def test_a_plan_on_disk_is_read_when_it_would_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first steps have as little beside them as where there is none."""
    read: list[Path] = []
    read_plan = plan_files.read_plan
    monkeypatch.setattr(plan_files, "read_plan", lambda path, graph: (read.append(path), read_plan(path, graph))[1])
    for known in (False, True):
        with plans_in(tmp_path), cold(graphs=True) as (workers, _), config.patch(gate=False):
            workers.hold, found = False, []
            for _ in range(PLAN_AFTER + 2):
                assert torch.equal(step(), chain()) and idle()
                found.append([len(read), *counts("kernels", "captured")])
            # One look for the file behind the capture; then it is run by plan.
            assert found == [[0, 0, 0], *[[0, 0, 1]] * (PLAN_AFTER - 2), [1, 0, 1], [1, 1, 1], [1, 2, 2]]
            assert len([*tmp_path.glob("plans/*")]) == 1
            # Workers come for a plan that is made, and not for one from disk.
            assert workers.n_expected == (not known) and not kitsune.explain().mended
        read.clear()


def test_the_background_begins_between_regions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that starts ends a region, and matchers are written from the first one's sixteenth call on."""
    thread = PacedThread()
    for module in (background, running):
        monkeypatch.setattr(module, "thread", thread)
    monkeypatch.setattr(learning, "MANY", 1)
    with cold():
        assert torch.equal(step(), chain())
        assert thread._thread is not None and idle() and kitsune.counters()["flushed"] == {"EXIT": 1}
    thread.close()


def test_lines_of_a_plan_from_disk_are_those_of_today(tmp_path: Path) -> None:
    for line in (10, 20):
        scope: dict[str, Any] = {"torch": torch}
        program = compile("\n" * (line - 1) + "x = (torch.arange(6.0).view(2, 3) * 2 + 1).abs()", "program.py", "exec")
        with plans_in(tmp_path), cold() as (workers, _):
            workers.hold = False
            for _ in range(3):
                with lazily():
                    exec(program, scope)
                assert scope["x"].tolist() == [[1, 3, 5], [7, 9, 11]] and kitsune.wait_for_kernels(SECONDS)
            (ready,) = [one for one in runner().ready.values() if one.plan is not None]
            assert {op.site.line for op in ready.plan.plan.graph.ops if op.site is not None} == {line}


def test_a_plan_that_cannot_be_made_is_told_by_the_next_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("of no use")

    with cold(), config.patch(verify=False), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        monkeypatch.setattr("kitsune.coming.show_plan", fail)
        assert torch.equal(step(), chain()) and kitsune.wait_for_kernels(SECONDS) and not said
        for _ in range(2):
            assert torch.equal(step(), chain())
        (one,) = said
        assert "could not be planned" in str(one.message) and "of no use" in str(one.message)


@pytest.mark.parametrize("where", ["while it is forgotten", "as it arrives", "in the place of the ask"])
def test_an_interrupt_loses_no_plan(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> Any:
        undo.undo()
        raise KeyboardInterrupt

    go, undo = threading.Event(), pytest.MonkeyPatch()
    with cold() as (workers, _), undo.context():
        workers.hold = False
        for k in range(PLAN_AFTER):
            if k == PLAN_AFTER - 1 and where == "while it is forgotten":
                background.thread.submit(lambda: go.wait(SECONDS) and None)
            elif k == PLAN_AFTER - 1 and where == "in the place of the ask":
                undo.setattr(running, "later", interrupted)
            with contextlib.suppress(KeyboardInterrupt):
                step()
        if where == "while it is forgotten":
            (ready,) = runner().ready.values()
            assert ready.coming.cancel()
            go.set()
        elif where == "as it arrives":
            assert kitsune.wait_for_kernels(SECONDS)
            undo.setattr(running.Runner, "_worthwhile", interrupted)
        for _ in range(3):
            with contextlib.suppress(KeyboardInterrupt):
                step()
            assert idle()
        assert torch.equal(step(), chain()) and counts("kernels")[0] > 0 and not kitsune.explain().mended


def test_who_waits_does_not_wait_for_what_an_interrupt_has_kept_from_being_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(background.thread, "submit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            background.soon(lambda: None)
    assert background.wait(SECONDS / 10)


def test_forgotten_regions_do_not_come_back() -> None:
    with cold() as (workers, _):
        step()
        assert planned()
        kitsune.reset()
        workers.release()
        assert torch.equal(step(), chain()) and counts("kernels", "unfused") == [0, 1]
        assert kitsune.wait_for_kernels(SECONDS) and torch.equal(step(), chain()) and counts("kernels") == [1]


def test_what_is_forgotten_before_it_is_begun_is_not_made() -> None:
    go = threading.Event()
    with cold() as (workers, _):
        step()
        assert idle()
        background.thread.submit(lambda: go.wait(SECONDS) and None)
        for _ in range(PLAN_AFTER):
            step()
        (ready,) = runner().ready.values()
        assert ready.coming is not None and not kitsune.wait_for_kernels(0.01)
        # As where the gate leaves a program to eager.
        runner().forget()
        there = kitsune.wait_for_kernels(1.0)
        go.set()
        assert there and idle() and not workers.asked and torch.equal(step(), chain())
