"""Matchers are written when a region ends, or before that by another thread: they take the calls that they took before."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import kitsune
from kitsune.ir import is_own
from kitsune.lazy import learning
from kitsune.lazy.call_keys import LONG
from kitsune.lazy.matcher_writer import example_of
from tests.runtime.backends import assert_equal, loop

STEPS = 5


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    kitsune.reset()
    yield
    kitsune.reset()


def lane() -> Any:
    return max(kitsune.session._thread.pipelines.values(), key=lambda pipeline: pipeline.on).lane


@contextlib.contextmanager
def written_by(write: Any) -> Iterator[None]:
    """Each matcher is to be written by what this starts."""
    with pytest.MonkeyPatch.context() as patch, kitsune.accelerate(device="cpu"):
        patch.setattr(learning, "MANY", 1)
        patch.setattr(lane(), "ask_to_write", write)
        yield


def forward(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(F.relu(x + 1) * 2)


def test_they_are_there_when_the_region_ends_and_not_before() -> None:
    x = torch.randn(4, 4)
    with kitsune.accelerate(device="cpu"):
        y = forward(x)
        (first, *_) = lane().unwritten
        assert len(lane().unwritten) == 4 and not first[0].start.matchers
        y.sum().item()
        assert not lane().unwritten and first[0].start.matchers.keys() == {first[0].func}


@pytest.mark.parametrize("late", [False, True])
def test_written_by_another_thread_they_take_the_same_calls(late: bool) -> None:
    with kitsune.disable():
        expected = loop(contextlib.nullcontext(), STEPS)
    asked: list[Future[None]] = []
    # It is there before: a region ends where the program starts a thread.
    with ThreadPoolExecutor(1, initializer=is_own) as other:
        other.submit(int).result()

        def write() -> None:
            context = lane()
            asked.append(other.submit(lambda: (time.sleep(0.01 * late), context.write_ahead(lambda: None))[1]))
            if not late:
                asked[-1].result()

        n_followed = []
        for by in (lambda: None, write):
            kitsune.reset()
            with written_by(by):
                assert_equal(loop(contextlib.nullcontext(), STEPS), expected)
            n_followed.append(kitsune.counters()["followed"])
    assert len(asked) > 5 and n_followed[0] == n_followed[1] > 0
    assert [future.result() for future in asked] == [None] * len(asked)


def test_a_call_that_has_done_something_else_meanwhile_gets_none() -> None:
    with kitsune.accelerate(device="cpu"):
        forward(torch.randn(4, 4))
        edge, key, *known = lane().unwritten[0]
        matcher = learning.matcher_for(edge, key, *known)
        assert matcher is not None and edge.start.calls[key] is edge
        lane().remember(edge.start, key, None)
        assert edge.forgotten and not edge.start.calls
        lane().take_by(matcher, edge)
        assert not edge.start.matchers


class Meddling:
    """A lock, and what another thread does before it is had."""

    def __init__(self, lock: Any, does: list[Any]) -> None:
        self.lock, self.does = lock, does

    def __enter__(self) -> None:
        if self.does:
            self.does.pop()()
        self.lock.acquire()

    def __exit__(self, *_: Any) -> None:
        self.lock.release()


def test_what_the_background_writes_is_taken_at_the_end_and_asks_for_no_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock is held while an operator runs: the program's next one would wait for the background to be done with it."""
    x = torch.randn(4, 4)
    with kitsune.accelerate(device="cpu"):
        y = forward(x)
        (first, *_), recorder, breaths = lane().unwritten, lane().recorder, []
        with monkeypatch.context() as patch:
            patch.setattr(recorder, "lock", Meddling(recorder.lock, [lambda: pytest.fail("the lock was asked for")]))
            lane().write_ahead(lambda: breaths.append(1))
        assert len(breaths) == 4 and not lane().unwritten and not first[0].start.matchers
        y.sum().item()
        assert first[0].start.matchers.keys() == {first[0].func}


@pytest.mark.parametrize(("takes", "forgets"), [(True, False), (False, True), (True, True)])
def test_what_another_thread_does_in_between_is_seen(takes: bool, forgets: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with kitsune.accelerate(device="cpu"):
        forward(torch.randn(4, 4))
        (edge, key, *known), recorder = lane().unwritten[0], lane().recorder
        one, other = (learning.matcher_for(edge, key, *known) for _ in range(2))

        def meddle() -> None:
            if takes:
                edge.start.matchers[edge.func] = other
            edge.forgotten = forgets

        with monkeypatch.context() as patch:
            patch.setattr(recorder, "lock", Meddling(recorder.lock, [meddle]))
            lane().take_by(one, edge)
        taken = edge.start.matchers.get(edge.func)
        # Of two calls at one place both are known.
        assert taken is (other if takes else None) if forgets else taken not in (None, one, other) and taken.one is one
        lane().unwritten.clear()


def test_an_example_holds_no_tensor() -> None:
    x = torch.randn(3)
    found = example_of((x, [torch.nn.Parameter(x), 1.5], slice(1, None, x), None, [x] * LONG))
    assert found == (
        tuple,
        (
            (torch.Tensor, None),
            (list, ((torch.nn.Parameter, None), (float, 1.5))),
            (slice, ((int, 1), (type(None), None), (torch.Tensor, None))),
            (type(None), None),
            (list, None),
        ),
    )
