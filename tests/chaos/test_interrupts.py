"""Interrupts at random points of a training: no mode is left, and the next training is equal to eager's to the bit."""

from __future__ import annotations

import _thread
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

import pytest
import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import kitsune
from kitsune.lazy import recorders
from kitsune.lazy.call_lane import CallLane
from kitsune.session import _thread as here
from tests.chaos.counting import FULL, Counts, Loop, lazily, many

STEPS = 6


@contextlib.contextmanager
def traced(trace: Any) -> Iterator[None]:
    """Python tells `trace` of each line of this thread."""
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)
        # Python looks at signals where functions begin, loops turn and calls end, and never on the way into a `finally`. What is
        # raised for a line may be raised there, too, and leaves a lock that no signal would.
        while recorders.lock._is_owned():  # type: ignore[attr-defined]
            recorders.lock.release()


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """Of an interrupt in a weak reference's callback Python itself only says that it came."""

    def unraisable(told: Any) -> None:
        if told.exc_type is not KeyboardInterrupt:
            before(told)

    before, sys.unraisablehook = sys.unraisablehook, unraisable
    try:
        yield
    finally:
        sys.unraisablehook = before


@contextlib.contextmanager
def after_lines(n: int) -> Iterator[None]:
    """An interrupt once that many lines of Python have been run, wherever that is."""
    left = n

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal left
        if event == "line":
            left -= 1
            if left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    with unheard(), traced(trace):
        yield


def lines_of_a_training() -> int:
    lines = 0

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        with lazily():
            train(Loop())
    finally:
        sys.settrace(before)
    return lines


def train(loop: Loop) -> None:
    for i in range(STEPS):
        loop.step(i)
        if i % 2:
            loop.losses[-1].item()


def leaves_nothing() -> str | None:
    if modes := [*_get_current_dispatch_mode_stack(), *_get_current_function_mode_stack()]:
        return f"modes are left: {[type(mode).__name__ for mode in modes]}, in {len(here.depth)} contexts"
    if here.depth:
        return "a context is left open"
    if recorders.lock._is_owned():  # type: ignore[attr-defined]
        return "a lock is left, for which every other thread would wait"
    return None


def one(n: int, counts: Counts, expected: list[torch.Tensor], interrupted: Callable[[], Any]) -> None:
    """One interrupted training, then a whole one."""
    try:
        with interrupted(), lazily():
            train(Loop())
    except KeyboardInterrupt:
        pass
    # Of torch's own: an interrupt within `no_grad` leaves it off, in eager too.
    torch.set_grad_enabled(True)
    left = leaves_nothing()
    loop = Loop()
    try:
        with lazily():
            train(loop)
        got: Any = loop.state()
    except Exception as error:
        got = f"{type(error).__name__}: {error}"
    counts.compare(f"after {n}", [None, *expected], [left, *got] if isinstance(got, list) else [left, got])


def test_at_random_lines(counts: Counts) -> None:
    """At any line of Python, Kitsune's own among them, as a signal may come."""
    loop = Loop()
    train(loop)
    expected, scattered = loop.state(), Random(7)
    lines_of_a_training()  # what is done once in a process is done
    kitsune.reset()
    total = lines_of_a_training()
    for _ in range(many(12, 200)):
        kitsune.reset()
        n = scattered.randrange(1, total)
        one(n, counts, expected, lambda n=n: after_lines(n))


@contextlib.contextmanager
def in_a_call(line: int) -> Iterator[None]:
    """An interrupt before a certain line of the function by which the call lane has torch make a call."""
    code, n_calls = CallLane.made.__code__, 0

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal n_calls
        if frame.f_code is not code:
            return None
        n_calls += event == "call"
        if n_calls > 40 and frame.f_lineno == line:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    with traced(trace):
        yield


@pytest.mark.timeout(300)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("which", ["first", "last"] if FULL else ["first"])
def test_before_each_line_of_the_first_entering(counts: Counts, which: str) -> None:
    """Nothing is left, no door is half put on, and the next entering finds all of them to be put on once; of hundreds of lines
    every fifth in a normal run."""
    every = many(5, 1)
    command = [sys.executable, "-W", "ignore", "-m", "tests.chaos.first_entering", which, str(every)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout)
    expected = told["expected"]
    assert (expected["same"], expected["followed"], told["lines"] > 400 // every) == (True, True, True)
    assert all(expected["doors"])
    for line in range(told["lines"] - len(told["wrong"])):
        counts.compare(str(line), None, None)
    for line, got in told["wrong"].items():
        counts.compare(line, None, str(got))


@pytest.mark.timeout(300)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("which", ["first", "last"] if FULL else ["first"])
@pytest.mark.parametrize(("what", "least"), [("leaving", 400), ("disabling", 300), ("enabling", 20)])
def test_before_each_line_of_leaving_and_of_disable(counts: Counts, what: str, least: int, which: str) -> None:
    """It is done all the same, once; of hundreds of lines every sixth in a normal run."""
    every = many(6, 1) if least > 20 else 1
    command = [sys.executable, "-W", "ignore", "-m", "tests.chaos.leaving", what, which, str(every)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout)
    assert told["expected"]["same"] and told["expected"]["followed"] and told["lines"] > least // every
    for line in range(told["lines"] - len(told["wrong"])):
        counts.compare(str(line), None, None)
    for line, got in told["wrong"].items():
        counts.compare(line, None, str(got))


def test_before_each_line_of_a_call(counts: Counts) -> None:
    """Calls and backwards are followed afterwards: nobody thinks that one is still being made."""
    loop = Loop()
    train(loop)
    expected = loop.state()
    lines = sorted({line for *_, line in CallLane.made.__code__.co_lines() if line})
    for line in lines[1:]:
        kitsune.reset()
        one(line, counts, expected, lambda line=line: in_a_call(line))
        with lazily():
            train(Loop())
        assert kitsune.counters()["backwards_followed"] > 0


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals come to the main thread")
def test_by_a_signal(counts: Counts) -> None:
    """A real signal at a random time; between two of them nothing is forgotten."""
    loop = Loop()
    train(loop)
    expected, scattered = loop.state(), Random(8)

    @contextlib.contextmanager
    def soon() -> Iterator[None]:
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        timer = threading.Timer(scattered.random() * 0.03, _thread.interrupt_main)
        timer.start()
        try:
            with unheard():
                yield
        finally:
            # It may come as late as here.
            with contextlib.suppress(KeyboardInterrupt):
                timer.join()
            signal.signal(signal.SIGINT, before)

    for n in range(many(4, 200)):
        one(n, counts, expected, soon)
