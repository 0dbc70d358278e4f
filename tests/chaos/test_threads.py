"""Threads: each with a context and a training of its own, with one model in turns, and with tensors of each other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import Queue
from typing import Any

import torch

import kitsune
from tests.chaos.counting import Counts, Loop, lazily, many

SECONDS = many(30, 1800)


def in_threads(*work: Callable[[], Any]) -> list[Any]:
    """What each returned, or its exception."""
    results: list[Any] = [None] * len(work)

    def run(k: int) -> None:
        try:
            results[k] = work[k]()
        except BaseException as error:
            results[k] = error

    threads = [threading.Thread(target=run, args=(k,), daemon=True) for k in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=SECONDS)
        assert not thread.is_alive(), "a deadlock"
    return results


def train(seed: int, steps: int, context: Callable[[], Any]) -> list[torch.Tensor]:
    loop = Loop(seed)
    with context():
        for i in range(steps):
            loop.step(i)
            if i % 7 == 0:
                loop.losses[-1].item()
    return loop.state()


def test_eight_trainings_at_once(counts: Counts) -> None:
    steps = many(12, 1000)
    expected = [train(k, steps, lambda: kitsune.disable()) for k in range(8)]
    got = in_threads(*(lambda k=k: train(k, steps, lazily) for k in range(8)))
    for k in range(8):
        counts.compare(f"thread {k}", expected[k], got[k])
    assert kitsune.counters()["backwards_followed"] > 8 * (steps - 6)


def test_one_model_in_turns(counts: Counts) -> None:
    """Every step in another thread, with the context of that thread."""

    def program(context: Callable[[], Any]) -> list[torch.Tensor]:
        loop = Loop()

        def step(i: int) -> None:
            with context():
                loop.step(i)

        for i in range(many(10, 200)):
            assert in_threads(lambda i=i: step(i)) == [None]
        return loop.state()

    counts.check("turns", program)


def test_tensors_pass_from_one_thread_to_another(counts: Counts) -> None:
    """One makes batches and writes to them, the other trains: what is pending here is used there."""
    steps = many(12, 500)

    def program(context: Callable[[], Any]) -> list[torch.Tensor]:
        loop, queue = Loop(), Queue[torch.Tensor](maxsize=2)

        def produce() -> None:
            with context():
                for i in range(steps):
                    batch = loop.xs[i % 16] * 1.5
                    queue.put(batch.add_(0.25))

        def consume() -> None:
            with context():
                for i in range(steps):
                    loop.xs[i % 16] = queue.get(timeout=SECONDS)
                    loop.step(i)

        assert in_threads(produce, consume) == [None, None]
        return loop.state()

    counts.check("batches", program)


def test_a_backward_in_another_thread(counts: Counts) -> None:
    def program(context: Callable[[], Any]) -> list[torch.Tensor]:
        loop = Loop()
        for i in range(6):
            with context():
                loss = loop.loss(i)
                assert in_threads(loss.backward) == [None]
                loop.optimizer.step()
                loop.optimizer.zero_grad()
        return loop.state()

    counts.check("backward", program)


def test_another_thread_evaluates_while_one_trains(counts: Counts) -> None:
    """It has no context: it sees the parameters of some step, whole, and never what is half done."""
    loop, stop, seen = Loop(), threading.Event(), []

    def evaluate() -> None:
        while not stop.is_set():
            with torch.no_grad():
                seen.append(loop.model[0].weight.detach().isfinite().all().item())

    def work() -> None:
        try:
            with lazily():
                for i in range(many(12, 500)):
                    loop.step(i)
        finally:
            stop.set()

    assert in_threads(evaluate, work) == [None, None]
    assert all(seen) and seen
    counts.compare("evaluated", train(0, many(12, 500), kitsune.disable)[-8:], loop.state()[-8:])
