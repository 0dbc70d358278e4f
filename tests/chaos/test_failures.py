"""Operators that fail in mid-region, at each place in turn: lack of memory and errors of any other kind."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import pytest
import torch

import kitsune
from kitsune.runtime.calls import call_of
from tests.chaos.counting import Counts, Loop, lazily, many

STEPS = 4
# The package has its function by this name.
replay = sys.modules["kitsune.runtime.replay"]


class Injected(RuntimeError):
    """No error of torch's."""


def train(loop: Loop) -> list[torch.Tensor]:
    for i in range(STEPS):
        loop.step(i)
    return loop.state()


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, Injected])
def test_at_each_operator_of_a_region(kind: type[Exception], counts: Counts, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is the program's, and what is trained afterwards, in the same and in another context, is eager's."""
    expected = train(Loop())
    n_calls, fails_at = [0], [0]

    def failing(op: Any, *rest: Any) -> None:
        n_calls[0] += 1
        if n_calls[0] == fails_at[0]:
            raise kind("injected")
        call_of(op)(op, *rest)

    monkeypatch.setattr(replay, "call_of", lambda op: failing)
    with lazily():
        train(Loop())
    total = n_calls[0]
    assert total > 40
    for k in range(1, total + 1, many(total // 4, 1)):
        kitsune.reset()
        n_calls[0], fails_at[0] = 0, k
        raised = [False]
        with lazily():
            # Where nobody needs the value any more, nothing is raised.
            with contextlib.suppress(kind):
                raised[0] = True
                train(Loop())
                raised[0] = False
            fails_at[0] = 0
            got = train(Loop())
        counts.compare(f"operator {k} of {total}", expected, got)
        with lazily():
            counts.compare(f"operator {k} of {total}, in another context", expected, train(Loop()))


def test_what_was_done_before_the_failure_is_done_once(counts: Counts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes in place of a region that fails: each was made wholly or not at all, in order."""
    left = [0]

    def failing(op: Any, *rest: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Injected("injected")
        call_of(op)(op, *rest)

    monkeypatch.setattr(replay, "call_of", lambda op: failing)
    for k in range(1, 9):
        kitsune.reset()
        xs = [torch.zeros(3) for _ in range(4)]
        left[0] = 0
        with contextlib.suppress(Injected), kitsune.accelerate(warmup=0, device="cpu"):
            left[0] = k
            for n, x in enumerate(xs):
                x.add_(n + 1)
                x.mul_(2)
        # Call number 2n + 1 adds n + 1 to the n-th, the next one doubles it; call number k fails, and none comes after it.
        expected = [float(n + 1) * (2 if 2 * n + 2 < k else 1) if 2 * n + 1 < k else 0.0 for n in range(4)]
        counts.compare(f"before {k}", expected, [x[0].item() for x in xs])
