"""While the gate times steps, nothing is begun in the background; and it does not wait until all is made there."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import TimeoutError as NotYetError
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import kitsune
from kitsune.background import later, wait
from kitsune.codegen import CompilePool
from kitsune.codegen.machine_code import Job
from kitsune.config import config
from kitsune.gate import WAITS_FOR_KERNELS, Gate
from kitsune.ir import quiet
from kitsune.ir.quiet_times import Quiet
from kitsune.paced_thread import PacedThread
from kitsune.running import PLAN_AFTER
from tests.chaos.test_workers import in_a_fork
from tests.runtime.backends import lazily
from tests.runtime.repeated import counts
from tests.runtime.test_background import spin
from tests.runtime.test_cold_start import cold, idle
from tests.runtime.tuned import steps, tuned

SECONDS = 60.0
JOB = Job("kernel.py", "kernel", False, True, False, 90, None)
# A worker that answers once there is a file.
WAITS = """import os, sys, time
for line in sys.stdin:
    while not os.path.exists({!r}):
        time.sleep(0.01)
    print('{{}}', flush=True)"""


@pytest.fixture(autouse=True)
def for_long(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("kitsune.ir.quiet_times.LASTS", SECONDS)
    yield
    quiet.end()


def comes(true: Callable[[], bool]) -> bool:
    """Does it become true?"""
    until = time.perf_counter() + SECONDS
    while not true() and time.perf_counter() < until:
        time.sleep(1e-3)
    return true()


def test_it_ends_by_itself_unless_it_is_asked_for_again() -> None:
    now = [0.0]
    one = Quiet(lambda: now[0])
    assert not one.is_on and one.ask() and one.is_on
    now[0] += 0.9 * SECONDS
    assert one.ask()
    now[0] += 0.9 * SECONDS
    assert one.is_on
    now[0] += 0.2 * SECONDS
    assert not one.is_on


def test_who_is_busy_is_waited_for_but_not_for_long() -> None:
    now = [0.0]
    one = Quiet(lambda: now[0])
    with one.busy():
        assert not one.ask()
        now[0] += 0.9
        assert not one.ask()
        now[0] += 0.2
        assert one.ask()
        one.end()
        assert not one.ask()
    assert one.ask()


def test_a_forked_child_waits_for_none_of_its_parents_threads() -> None:
    begun, ends = threading.Event(), threading.Event()

    def work() -> None:
        with quiet.busy():
            begun.set()
            ends.wait(SECONDS)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert begun.wait(SECONDS) and not quiet.ask()
        with quiet.busy():
            # The thread that forks is there in the child, and in the middle of something still.
            assert in_a_fork(lambda: len(quiet._busy)) == 1
        assert in_a_fork(quiet.ask) is True
    finally:
        ends.set()
        thread.join()


def test_the_background_thread_begins_nothing() -> None:
    paced, begun = PacedThread(), threading.Event()
    quiet.ask()
    paced.submit(begun.set)
    assert not begun.wait(0.2)
    quiet.end()
    assert begun.wait(SECONDS)
    paced.close()


def test_the_background_thread_stops_in_the_middle_of_a_call() -> None:
    paced, turns, go_on = PacedThread(), [0], [True]

    def work() -> None:
        while go_on[0]:
            spin(100)
            turns[0] += 1

    paced.submit(work)
    assert comes(lambda: turns[0] > 0)
    quiet.ask()

    def stands() -> bool:
        before = turns[0]
        time.sleep(0.05)
        return turns[0] == before

    assert comes(stands)
    before = turns[0]
    quiet.end()
    assert comes(lambda: turns[0] > before)
    go_on[0] = False
    paced.close()


def test_who_waits_for_the_background_ends_the_quiet() -> None:
    quiet.ask()
    made = later(lambda: ("made", []))
    assert wait(SECONDS) and made.result() == "made" and not quiet.is_on


def test_a_compiler_ends_what_it_is_at_and_begins_nothing_else(tmp_path: Path) -> None:
    pool = CompilePool(1, SECONDS, [sys.executable, "-c", WAITS.format(str(tmp_path / "go"))])
    first = pool.submit(JOB)
    assert comes(lambda: bool(quiet._busy))
    second = pool.submit(JOB)
    assert not quiet.ask()
    (tmp_path / "go").touch()
    first.result(SECONDS)
    assert comes(quiet.ask)
    with pytest.raises(NotYetError):
        second.result(0.2)
    quiet.end()
    second.result(SECONDS)
    pool.close()


def test_no_tiles_are_tried(tmp_path: Path) -> None:
    with tuned(tmp_path) as device:
        steps(8, during=quiet.ask)
        assert counts("replayed")[0] >= 6 and not device.started
        steps(8)
        assert device.started


class Training:
    """A step whose kernels are there, and another program beside it, whose kernels never are."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 3))
        self.model, self.optimizer = model, torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=True)
        self.x = torch.randn(8, 6)
        self.n_steps = 0

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(self.x).square().mean().backward()
        self.optimizer.step()
        self.n_steps += 1

    def evaluate(self) -> float:
        with torch.no_grad():
            found = self.model(self.x[:4])
            return ((found + 1) * 0.5 - found).abs().sum().item()

    def until_decided(self, most: int) -> None:
        while self.n_steps < most and not counts("gate_decided")[0]:
            self.step()


@pytest.fixture
def gated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("kitsune.pipeline.Gate", lambda _, *given: Gate(True, *given))
    with config.patch(gate=True, fuse=True):
        yield


@pytest.mark.usefixtures("gated")
def test_kernels_that_a_step_does_not_need_are_not_waited_for() -> None:
    with cold(graphs=True) as (workers, _), lazily():
        training = Training()
        workers.hold = False
        for _ in range(6):
            training.step()
            assert idle()
        workers.hold = True
        for _ in range(PLAN_AFTER + 1):
            training.evaluate()
            assert idle()
        assert counts("compiling")[0] > 0
        training.until_decided(WAITS_FOR_KERNELS)
        assert training.n_steps < 250 and counts("gate_decided")[0] and counts("compiling")[0] > 0


@pytest.mark.usefixtures("gated")
def test_nothing_is_decided_while_a_step_lacks_its_kernels() -> None:
    with cold(graphs=True) as (workers, _), lazily():
        training = Training()
        training.until_decided(400)
        assert training.n_steps == 400 and counts("kernels", "gate_left") == [0, 0]
        workers.release()
        training.until_decided(650)
        assert training.n_steps < 650 and not quiet.is_on


@pytest.mark.usefixtures("gated")
def test_a_plan_is_not_made_while_steps_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[Any] = []
    monkeypatch.setattr("kitsune.coming.show_plan", lambda *given, **how: planned.append(given))
    with cold(), lazily():
        quiet.ask()
        training = Training()
        for _ in range(6):
            training.step()
        time.sleep(0.1)
        assert not planned
        kitsune.wait_for_kernels(SECONDS)
        assert planned
