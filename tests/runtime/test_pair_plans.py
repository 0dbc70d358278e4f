"""The plans of a region's two parts come together: in the background, from disk, or not at all."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kitsune
from kitsune import coming, plan_files
from kitsune.codegen import WorkerFailed
from kitsune.config import KitsuneWarning, config
from kitsune.ir import Graph, Plan
from kitsune.lazy import first_sight
from kitsune.planning import Planner
from kitsune.runtime import ThreadPlans
from kitsune.scheduler import Pair
from tests.runtime.repeated import _filled
from tests.runtime.test_cold_start import SECONDS, Workers, cold, idle, planned
from tests.steady.test_cut_pairs import run, runs, the_same_each_time

__all__ = ["runs"]
JOINED = ["first, joined", "second, joined"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where plans are kept, also small ones."""
    monkeypatch.setattr(plan_files, "WORTH", 1)
    with config.patch(cache_dir=str(tmp_path), verify=False, numerics="bitwise", gate=False):
        yield tmp_path / "plans"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was planned: single graphs, and pairs."""
    found: list[str] = []
    plan, plan_pair = Planner.plan, Planner.plan_pair

    def one(self: Planner, graph: Graph, show: Any = None) -> Plan:
        found.append("graph")
        return plan(self, graph, show)

    def two(self: Planner, pair: Pair, show: Any = None) -> Any:
        found.append("pair")
        return plan_pair(self, pair, show)

    monkeypatch.setattr(Planner, "plan", one)
    monkeypatch.setattr(Planner, "plan_pair", two)
    return found


def train(expected: list[Any]) -> None:
    """A training that is the same as in eager, and waits for nothing but the background thread at its end."""
    assert run(the_same_each_time, kitsune.accelerate(device="cpu")) == expected
    assert planned()


@pytest.fixture(scope="module")
def expected() -> list[Any]:
    return run(the_same_each_time, contextlib.nullcontext())


def parts(workers: Workers, expected: list[Any], runs: list[str]) -> list[str]:
    """How the last step was run once all is there."""
    train(expected)
    workers.release()
    train(expected)
    return runs[-2:]


def test_both_parts_change_over_when_the_kernels_of_both_are_there(
    runs: list[str], asked: list[str], expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As in `tests.runtime.repeated.graphs`.
    monkeypatch.setattr("kitsune.runtime.captured.place_like", _filled)
    with cold(graphs=True) as (workers, repeater):
        train(expected)
        assert set(runs) == {"first", "second"} and asked.count("pair") == 1 and workers.asked
        names = [*workers.asked]
        workers._settle(workers.asked[names[0]])
        train(expected)
        assert set(runs) == {"first", "second"}, "one kernel is there, and others are not"
        workers.release()
        before, alive = kitsune.counters()["captured"], repeater.n_alive
        train(expected)
        assert runs[-2:] == JOINED and kitsune.counters()["captured"] == before + 2
        # What was captured of the parts by themselves is not kept. Two others are of the regions around.
        assert repeater.n_alive <= alive and not kitsune.explain().mended


def test_from_the_first_step_with_kernels_on_both_parts_are_replayed(runs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is known of their inputs is known of those parts as well."""
    monkeypatch.setattr("kitsune.runtime.captured.place_like", _filled)
    replayed: list[int] = []

    def behind(k: int, net: Any, loss: Any, found: list[Any]) -> None:
        if k == 8:
            workers.release()
        replayed.append(kitsune.counters()["replayed"])
        the_same_each_time(k, net, loss, found)

    expected = run(the_same_each_time, contextlib.nullcontext())
    with cold(graphs=True) as (workers, _):
        assert run(behind, kitsune.accelerate(device="cpu")) == expected
    assert runs.index("first, joined") > 10 and [b - a for a, b in itertools.pairwise(replayed[5:])] == [2] * 8


def test_plans_on_disk_are_not_made_again(runs: list[str], asked: list[str], folder: Path, expected: list[Any]) -> None:
    with cold() as (workers, _):
        assert parts(workers, expected, runs) == JOINED and asked.count("pair") == 1
        assert len([*folder.glob("*.plan")]) >= 2
    asked.clear()
    for _ in range(2):
        runs.clear()
        with cold() as (workers, _):
            assert parts(workers, expected, runs) == JOINED and "pair" not in asked
    # One of the two is gone.
    for path in sorted(folder.glob("*.plan"))[1:]:
        path.unlink()
    with cold() as (workers, _):
        assert parts(workers, expected, runs) == JOINED and asked.count("pair") == 1


def test_plans_on_disk_are_read_ahead(runs: list[str], expected: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_sight, "FIRST", 2)
    for known in (False, True):
        runs.clear()
        if known:
            monkeypatch.setattr(coming, "show_pair", lambda *given: pytest.fail("the plans are there"))
        with cold() as (workers, _):
            assert parts(workers, expected, runs) == JOINED and idle()


@pytest.mark.parametrize("error", [WorkerFailed("no compiler"), RuntimeError("a bug")])
def test_where_plans_of_both_fail_each_part_has_its_own(
    error: Exception, runs: list[str], expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*given: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr(coming, "show_pair", fails)
    is_bug = not isinstance(error, WorkerFailed)
    with cold() as (workers, _), pytest.warns(KitsuneWarning, match="be planned") if is_bug else contextlib.nullcontext():
        workers.hold = False
        for _ in range(5):
            train(expected)
        assert "first, joined" not in runs and kitsune.counters()["kernels"]


def test_parts_that_cannot_be_one_have_plans_of_their_own(
    runs: list[str], asked: list[str], expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kitsune.scheduler.pairs.why_not_one", lambda pair: "they are told apart here")
    with cold() as (workers, _):
        workers.hold = False
        for _ in range(5):
            # Nobody asks for more than what the runs themselves do.
            assert run(the_same_each_time, kitsune.accelerate(device="cpu")) == expected and idle()
        assert "first, joined" not in runs and asked.count("pair") == 1
        unfused = kitsune.counters()["unfused"]
        assert run(the_same_each_time, kitsune.accelerate(device="cpu")) == expected
        assert kitsune.counters()["unfused"] == unfused > 0 and not kitsune.explain().mended


def test_kernels_that_cannot_be_compiled_leave_the_parts_to_themselves(runs: list[str], expected: list[Any]) -> None:
    with cold() as (workers, _):
        workers.error = WorkerFailed("no compiler")
        workers.hold = False
        with pytest.warns(KitsuneWarning, match="stays unfused"):
            for _ in range(5):
                train(expected)
        assert "first, joined" not in runs and not kitsune.counters()["kernels"]


def test_libraries_make_their_plans_before_the_parts_change_over(
    runs: list[str], expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[int] = []
    monkeypatch.setattr(ThreadPlans, "needed", lambda self, graph: [*graph.ops][:2])
    monkeypatch.setattr(ThreadPlans, "go_on", lambda self, ops: (ops.pop(), left.append(len(ops))))
    with cold() as (workers, _):
        workers.hold = False
        for _ in range(5):
            train(expected)
        assert "first, joined" in runs and left.count(0) >= 1
    left.clear()
    runs.clear()
    made: list[int] = []
    monkeypatch.setattr(ThreadPlans, "go_on", lambda self, ops: None)
    monkeypatch.setattr(ThreadPlans, "make_all", lambda self, ops: made.append(len(ops)))
    with cold() as (workers, _):
        workers.hold = False
        train(expected)
        assert "first, joined" not in runs
        # Who waits has them in the next step.
        assert kitsune.wait_for_kernels(SECONDS) and made
        run(the_same_each_time, kitsune.accelerate(device="cpu"))
        assert runs[-2:] == JOINED
