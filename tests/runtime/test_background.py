"""The thread for work that can wait: it rests, it calls in order, and it ends with the process."""

from __future__ import annotations

import contextlib
import gc
import itertools
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from kitsune import hearing
from kitsune.background import later, n_awaited, wait, when_done
from kitsune.paced_thread import LOOK_S, REST, REST_IN_STEP, WORK_S, PacedThread

SECONDS = 60.0


@pytest.fixture(autouse=True, scope="module")
def calls_in_here_are_heard() -> None:
    if (tool := hearing._tool()) is not None:
        hearing.tell_of(hearing.codes_of(sys.modules[__name__]), tool)


def same(k: int) -> int:
    return k


def spin(n: int) -> int:
    return sum(same(k) for k in range(n))


def test_calls_are_made_in_order_on_one_thread() -> None:
    paced, made, done = PacedThread(), [], threading.Event()
    for k in range(5):
        paced.submit(lambda k=k: made.append((k, threading.get_ident())))  # type: ignore[misc]
    paced.submit(done.set)
    assert done.wait(SECONDS)
    assert [k for k, _ in made] == [0, 1, 2, 3, 4] and len({ident for _, ident in made} - {threading.get_ident()}) == 1
    paced.close()


def measured(paced: PacedThread) -> Future[tuple[float, float]]:
    """The seconds, and the seconds of computing, that a call takes."""
    took: Future[tuple[float, float]] = Future()

    def work() -> None:
        start, cpu = time.perf_counter(), time.thread_time()
        spin(60_000)
        took.set_result((time.perf_counter() - start, time.thread_time() - cpu))

    paced.submit(work)
    return took


def rested_in_full(paced: PacedThread) -> bool:
    """Is each rest as long as what was computed before it asks for? By the clock, at the beginning and at the end of each."""
    rests, rest = [], paced._rest

    def timed(worked: float) -> None:
        start = time.perf_counter()
        rest(worked)
        rests.append(time.perf_counter() - start >= worked * REST_IN_STEP)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paced, "_rest", timed)
        measured(paced).result(SECONDS)
    paced.close()
    assert len(rests) > 10
    return all(rests)


def test_it_rests_longer_than_it_computes_while_the_program_does() -> None:
    paced = PacedThread()
    took = measured(paced)
    until = time.perf_counter() + SECONDS
    while not took.done() and time.perf_counter() < until:
        spin(100)
    wall, cpu = took.result(0)
    assert wall > cpu * (1 + REST) * 0.7
    paced.close()


@pytest.mark.parametrize("alone", [True, False])
def test_it_goes_on_while_nobody_else_computes(alone: bool) -> None:
    paced, slept = PacedThread(), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kitsune.paced_thread._alone", lambda: alone)
        patch.setattr("kitsune.paced_thread.time.sleep", slept.append)
        measured(paced).result(SECONDS)
        paced.close()
    assert bool(slept) is not alone and all(seconds >= REST * WORK_S for seconds in slept)


def test_it_does_not_rest_in_what_is_made_at_a_stretch() -> None:
    paced, slept, ended = PacedThread(), [], Future[tuple[int, float]]()

    def work() -> None:
        start = time.thread_time()
        with contextlib.suppress(KeyError), paced.at_a_stretch():
            spin(60_000)
            raise KeyError
        n_before, took = len(slept), time.thread_time() - start
        spin(60_000)
        ended.set_result((n_before, took))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kitsune.paced_thread._alone", lambda: False)
        patch.setattr("kitsune.paced_thread.time.sleep", slept.append)
        paced.submit(work)
        n_before, took = ended.result(SECONDS)
        paced.close()
    assert not n_before and slept and slept[0] < REST * took, "nor does it rest for that time afterwards"


def test_it_rests_longer_still_while_a_step_is_made() -> None:
    paced = PacedThread()
    paced.in_a_step = lambda: True
    assert rested_in_full(paced)


def test_it_goes_on_soon_after_the_step() -> None:
    paced, slept, steps = PacedThread(), [], [True, True, True]
    paced.in_a_step = lambda: bool(steps and steps.pop())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kitsune.paced_thread._alone", lambda: True)
        patch.setattr("kitsune.paced_thread.time.sleep", slept.append)
        measured(paced).result(SECONDS)
        paced.close()
    # Three looks find the step going on, the first of them before it rests at all.
    assert len(slept) == 2 and all(0 < seconds <= LOOK_S for seconds in slept)


@pytest.mark.parametrize("moves", [True, False])
def test_in_a_step_it_goes_on_while_an_operator_takes_its_time(moves: bool) -> None:
    paced, places = PacedThread(), itertools.count()
    paced.in_a_step, paced.where = lambda: True, lambda: next(places) if moves else "here"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kitsune.paced_thread._alone", lambda: True)
        assert rested_in_full(paced) is moves


def test_in_a_step_it_rests_where_nobody_can_tell_how_far_it_is() -> None:
    paced = PacedThread()
    paced.in_a_step, paced.where = lambda: True, lambda: None
    assert rested_in_full(paced)


@pytest.mark.parametrize("then", ["the step ends", "an operator takes long", "somebody waits", "it is closed", "time goes by"])
def test_what_is_for_idle_moments_is_not_begun_while_a_step_goes_on(then: str) -> None:
    paced, made, places, now = PacedThread(), threading.Event(), itertools.count(), {"step": True, "moves": True}
    paced.in_a_step, paced.where = lambda: now["step"], lambda: next(places) if now["moves"] else "here"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kitsune.paced_thread._alone", lambda: True)
        patch.setattr("kitsune.paced_thread.PATIENCE_S", 0.2 if then == "time goes by" else SECONDS)
        paced.submit(made.set, in_idle_moments=True)
        assert not made.wait(50 * LOOK_S)
        if then == "the step ends":
            now["step"] = False
        elif then == "an operator takes long":
            now["moves"] = False
        elif then == "somebody waits":
            paced.n_waiting = 1
        elif then == "it is closed":
            paced.close()
        assert made.wait(SECONDS)
        # What comes next is not for them, unless it says so.
        now.update(step=True, moves=True)
        paced.n_waiting, again = 0, threading.Event()
        if then != "it is closed":
            paced.submit(again.set)
            assert again.wait(SECONDS) and not paced._patient_until
    paced.close()


def test_what_is_not_heard_rests_where_it_breathes() -> None:
    rests: list[float] = []

    def work(breathes: bool) -> None:
        until = time.thread_time() + 3 * WORK_S
        while time.thread_time() < until:
            if breathes:
                paced.breathe()
        done.set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kitsune.paced_thread.hearing", lambda hear: contextlib.nullcontext())
        for breathes in (False, True):
            paced, done = PacedThread(), threading.Event()
            patch.setattr(paced, "_rest", rests.append)
            paced.submit(lambda: work(breathes))  # noqa: B023
            assert done.wait(SECONDS) and bool(rests) is breathes and all(worked >= WORK_S for worked in rests)
            paced.close()


def test_it_does_not_rest_while_somebody_waits_for_it() -> None:
    paced, slept = PacedThread(), []
    paced.n_waiting = 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kitsune.paced_thread.time.sleep", slept.append)
        measured(paced).result(SECONDS)
        paced.close()
    assert not slept


def test_what_has_a_lower_rank_is_called_first() -> None:
    paced, made, begun, go = PacedThread(), [], threading.Event(), threading.Event()

    def first() -> None:
        begun.set()
        go.wait(SECONDS)

    done = threading.Event()
    paced.submit(first)
    assert begun.wait(SECONDS)
    for rank in (1, 0, 1, 0):
        paced.submit(lambda rank=rank: made.append(rank), rank)  # type: ignore[misc]
    paced.submit(done.set, 2)
    go.set()
    assert done.wait(SECONDS) and made == [0, 0, 1, 1]
    paced.close()


def test_calls_are_heard_only_while_there_is_something_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    paced, seen, done = PacedThread(), [], threading.Event()

    @contextlib.contextmanager
    def noted(hear: Any) -> Iterator[None]:
        seen.append(True)
        with hearing.hearing(hear):
            yield
        seen.append(False)

    monkeypatch.setattr("kitsune.paced_thread.hearing", noted)
    paced.submit(lambda: seen.append("a"))
    paced.submit(lambda: seen.append("b"), rank=1)
    paced.submit(done.set, rank=2)
    assert done.wait(60)
    paced.close()
    # A profiler's hook in one thread can make the calls of all threads slower.
    assert seen == [True, "a", False, True, "b", False, True, False]


def test_closing_ends_a_call_that_is_going_on() -> None:
    paced, begun = PacedThread(), threading.Event()

    def work() -> None:
        begun.set()
        while True:
            spin(10)

    paced.submit(work)
    assert begun.wait(SECONDS)
    paced.close()
    assert paced._thread is not None and not paced._thread.is_alive()
    paced.submit(begun.clear)
    assert begun.is_set()


def test_a_process_ends_at_once_and_without_a_word() -> None:
    code = (
        "import time\nfrom kitsune.background import later\n"
        "def work():\n    while True: abs(1)\n"
        "later(work)\ntime.sleep(0.2)\nprint('end')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


def test_a_result_waits_for_the_futures_beside_it() -> None:
    beside: Future[None] = Future()
    result = later(lambda: ("made", [beside]))
    assert not wait(0.05) and not result.done()
    beside.set_exception(RuntimeError("of no interest"))
    assert wait(SECONDS) and result.result() == "made"


def test_an_error_is_the_result() -> None:
    def fail() -> Any:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        later(fail).result(SECONDS)
    assert wait(SECONDS)


def test_without_futures_it_is_called_at_once() -> None:
    called: list[int] = []
    when_done([], lambda: called.append(1))
    assert called == [1]


def test_what_is_being_made_is_open_before_anything_is_awaited_and_until_that_has_come() -> None:
    assert wait(SECONDS)
    began, go_on, coming = threading.Event(), threading.Event(), Future[None]()

    def make() -> tuple[int, list[Future[Any]]]:
        began.set()
        assert go_on.wait(SECONDS)
        return 1, [coming]

    made = later(make)
    assert began.wait(SECONDS) and not wait(0) and n_awaited() == 0
    go_on.set()
    until = time.perf_counter() + SECONDS
    while not n_awaited() and time.perf_counter() < until:
        time.sleep(1e-3)
    assert not wait(0) and n_awaited() == 1
    coming.set_result(None)
    assert made.result(SECONDS) == 1 and wait(SECONDS) and n_awaited() == 0


def test_a_future_that_stays_does_not_keep_what_was_called() -> None:
    class Call:
        """As that of a plan, which has memory on the device."""

        def __call__(self) -> None:
            called.append(1)

    called: list[int] = []
    stays, call = Future[None](), Call()
    gone = weakref.ref(call)
    when_done([stays], call)
    del call
    gc.collect()
    assert gone() is not None and not called
    stays.set_result(None)
    gc.collect()
    assert called == [1] and gone() is None
