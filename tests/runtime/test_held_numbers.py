"""A number that is held at one replay after the other is handed out as a copy, and nothing has to be moved for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import kitsune
from kitsune.runtime import lent_outputs
from tests.runtime.backends import lazily
from tests.runtime.repeated import graphs


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Each time that memory is moved."""
    found: list[Any] = []
    move = lent_outputs.OutputMemory._move
    monkeypatch.setattr(lent_outputs.OutputMemory, "_move", lambda self, alive: (found.append(len(alive)), move(self, alive)))
    with graphs(kernels=False), lazily():
        yield found


@pytest.fixture
def x() -> torch.Tensor:
    """What each region adds one to."""
    return torch.zeros(3, 2)


def number(x: torch.Tensor) -> torch.Tensor:
    """A sum and the same detached, made by one region."""
    x.add_(1)
    total = (x * 2).sum()
    kept = total.detach()
    kitsune.flush()
    assert total.item() == kept.item()
    return kept


def test_a_number_that_is_held_is_moved_twice_and_then_copied(moves: list[Any], x: torch.Tensor) -> None:
    held = [number(x) for k in range(60)]
    assert [x.item() for x in held] == [12.0 * k for k in range(1, 61)]
    assert len(moves) == lent_outputs.TIMES_HELD
    assert kitsune.counters()["replayed"] > 50 and kitsune.counters()["moved"] > 50


def test_a_copy_is_written_by_nobody_else(moves: list[Any], x: torch.Tensor) -> None:
    held = []
    for k in range(30):
        held.append(number(x))
        if k % 2:
            held[-1].add_(1)
            held.append(held[-1].view(1))
    assert [x.item() for x in held] == [12.0 * (k + 1) + k % 2 for k in range(30) for _ in range(1 + k % 2)]
    assert len(moves) == lent_outputs.TIMES_HELD


def test_what_is_not_held_any_more_is_lent_again(moves: list[Any], x: torch.Tensor) -> None:
    held = [number(x) for k in range(12)]
    moved = kitsune.counters()["moved"]
    for k in range(60):
        assert number(x).item() == 12.0 * (k + 13)
    copied = kitsune.counters()["moved"] - moved
    assert copied <= lent_outputs.IN_VAIN + 1
    assert [x.item() for x in held] == [12.0 * (k + 1) for k in range(12)]


def test_what_is_large_or_seen_in_two_ways_is_moved(moves: list[Any], x: torch.Tensor) -> None:
    held = []
    for _ in range(20):
        x.add_(1)
        y, z = x * 2, x[0] * 3
        held += [y, z, z[1]]
        kitsune.flush()
    assert len(moves) > 20
    assert [t.sum().item() for t in held] == [f * k for k in range(1, 21) for f in (12.0, 6.0, 3.0)]


def test_no_memory_for_a_copy_is_said_before_the_replay(
    moves: list[Any], x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After it, the region would be run a second time."""
    held = [number(x) for _ in range(12)]
    empty_like = torch.empty_like

    def fails(like: Any, **options: Any) -> Any:
        monkeypatch.setattr(torch, "empty_like", empty_like)
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(torch, "empty_like", fails)
    held += [number(x) for _ in range(12)]
    assert torch.empty_like is empty_like
    assert [t.item() for t in held] == [12.0 * k for k in range(1, 25)]
