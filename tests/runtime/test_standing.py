"""Regions that are replayed without the rest of a run: what ends that, and what it must not leave behind."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest
import torch

import kitsune
from kitsune.config import KitsuneWarning
from kitsune.runtime import lent_outputs
from kitsune.standing import Replays
from tests.runtime.backends import lazily, runner
from tests.runtime.repeated import Repeater, graphs


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """For each region that has run: was it replayed at once?"""
    found: list[bool] = []
    replay = Replays.replay
    monkeypatch.setattr(Replays, "replay", lambda self, *of: (result := replay(self, *of), found.append(result is not None))[0])
    with graphs(kernels=False), lazily():
        yield found


def total(x: torch.Tensor) -> torch.Tensor:
    """A number made by one region."""
    x.add_(1)
    found = (x * 2).sum()
    kitsune.flush()
    return found


def test_results_are_no_inference_tensors(replayed: list[bool]) -> None:
    x, held = torch.zeros(3, 2), []
    for k in range(12):
        x.add_(1)
        held.append((x * 2).sum())
        if k == 8:
            with torch.inference_mode():
                kitsune.flush()
        else:
            kitsune.flush()
    assert replayed[7:10] == [True, False, True]
    assert [found.item() for found in held] == [12.0 * k for k in range(1, 13)]
    assert not any(found.data.is_inference() for found in held)


def test_another_way_to_run_a_region_that_is_coming_is_met(replayed: list[bool]) -> None:
    x = torch.zeros(3, 2)
    for _ in range(9):
        total(x)
    assert replayed[-1]
    (ready,) = [one for one in runner().ready.values() if one.steady is not None and one.steady.captured is not None]
    ready.coming = Future()
    for _ in range(3):
        total(x)
    assert not any(replayed[-3:])
    ready.coming = None
    assert [total(x).item() for _ in range(2)] == [12.0 * 13, 12.0 * 14]
    assert replayed[-1]


def test_views_of_inputs_are_made_beside_a_replay_and_beneath_autograd(replayed: list[bool]) -> None:
    weight, batch = torch.ones(3, 2, requires_grad=True), torch.ones(3, 2)
    for k in range(10):
        with torch.no_grad():
            weight.add_(1)
        row = weight.detach()[1]
        product = weight.detach() * batch
        turned = weight.t()
        kitsune.flush()
        assert row.tolist() == [k + 2.0] * 2 and product.tolist() == [[k + 2.0] * 2] * 3
        assert not turned.cell.real.requires_grad and turned.cell.real._base is None
    assert replayed[-4:] == [True] * 4


def test_a_view_of_a_result_is_moved_with_it_before_the_next_replay(replayed: list[bool]) -> None:
    weight, rows = torch.ones(8, requires_grad=True), []
    batches = [torch.full((8,), k + 1.0) for k in range(12)]
    for batch in batches:
        product = weight * batch
        kitsune.flush()
        row = product.detach()[2:5]
        tripled = row * 3
        kitsune.flush()
        assert tripled.tolist() == (3 * batch[2:5]).tolist()
        rows.append(row)
    assert [row.tolist() for row in rows] == [batch[2:5].tolist() for batch in batches]
    assert replayed[-6:] == [True] * 6 and not kitsune.counters()["graph_missed"]


def test_inputs_that_are_no_run_of_bytes_are_copied_before_a_replay(replayed: list[bool]) -> None:
    batches = [torch.full((3, 4), float(k))[:, ::2] for k in range(1, 13)]
    for k, batch in enumerate(batches, 1):
        found = (batch * 2).sum()
        kitsune.flush()
        assert found.item() == 12.0 * k
    assert replayed[-4:] == [True] * 4


def test_a_failure_of_a_replay_is_told_once(replayed: list[bool]) -> None:
    x = torch.zeros(3, 2)
    for _ in range(9):
        total(x)
    recorder: Any = runner().steady.recorder
    assert isinstance(recorder, Repeater)
    recorder.broken["replay"] = RuntimeError("no")
    with pytest.warns(KitsuneWarning, match="A replay failed"):
        found = total(x)
    assert found.item() == 120.0 and not replayed[-1]


def test_memory_for_copies_belongs_to_the_stream_that_it_is_used_on(
    replayed: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    streams, spares = [1], []
    monkeypatch.setattr(lent_outputs.streams, "handle_of", lambda device: lambda: streams[-1])
    x, held = torch.zeros(3, 2), []
    for k in range(12):
        held.append(total(x))
        if k == 9:
            (memory,) = next(iter(runner().steady._kept.values()))._lent.memories
            spares = [t.data_ptr() for t in memory._spares]
            assert len(spares) > 2
            streams.append(2)
    assert not {found.data_ptr() for found in held[10:]} & set(spares)
    assert [found.item() for found in held] == [12.0 * k for k in range(1, 13)]
