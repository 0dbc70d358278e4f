"""Memory that nobody uses: when it goes back to the device, and what gives way to what."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kitsune
from kitsune.ir import lent_memory
from kitsune.runtime import asked_bytes, give_back, has_room, was_lent, would_rise
from kitsune.runtime.idle import idle_bytes, reserved_bytes
from kitsune.runtime.steady import MAX_CAPTURES
from tests.runtime.backends import lazily
from tests.runtime.repeated import counts, graphs

GPU = torch.device("cuda", 0)
MIB = 1 << 20


def allocator(patch: pytest.MonkeyPatch, **mebibytes: tuple[int, int]) -> list[str]:
    """An allocator with so much now and at its peak; returns what is asked of it."""
    asked: list[str] = []
    found = {f"{name}_bytes": {"all": {"current": now * MIB, "peak": most * MIB}} for name, (now, most) in mebibytes.items()}
    patch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda device: found)
    patch.setattr(torch.cuda, "empty_cache", lambda: asked.append("empty_cache"))
    return asked


@pytest.mark.parametrize(("reserved", "goes"), [(131, False), (132, True), (5000, True)])
def test_what_is_cached_for_nobody_goes_back_where_it_is_much(reserved: int, goes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = allocator(monkeypatch, reserved=(reserved, 5000), allocated=(100, 4000))
    give_back(GPU)
    assert asked == ["empty_cache"] * goes
    give_back(torch.device("cpu"))
    assert asked == ["empty_cache"] * goes


@pytest.mark.parametrize(
    ("reserved", "allocated", "ours", "rises"),
    [
        # ResNet-50: an eager step takes 2.7 GiB, and cannot have the 1.3 of the arena.
        ((3400, 3700), (1900, 3300), 1300, True),
        ((3400, 6100), (1900, 3300), 1300, False),
        ((3400, 4769), (1900, 3300), 0, False),
        ((3400, 4768), (1900, 3300), 0, True),
    ],
)
def test_what_was_needed_once_is_taken_to_be_needed_again(
    reserved: tuple[int, int], allocated: tuple[int, int], ours: int, rises: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocator(monkeypatch, reserved=reserved, allocated=allocated)
    assert would_rise(GPU, ours * MIB) is rises
    assert not would_rise(torch.device("cpu"), ours * MIB)


@pytest.mark.parametrize(("nbytes", "was"), [(10, True), (11, False)])
def test_what_was_lent_before_is_no_more_than_ever(nbytes: int, was: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    allocator(monkeypatch, reserved=(100, 100), allocated=(50, 60))
    assert was_lent(GPU, nbytes * MIB) is was and was_lent(torch.device("cpu"), nbytes * MIB)


def test_before_the_allocator_has_begun_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = allocator(monkeypatch)
    give_back(GPU)
    assert was_lent(GPU, MIB)
    assert not would_rise(GPU, 0) and not asked


@pytest.mark.parametrize("known", [True, False])
def test_a_result_that_is_held_leaves_the_memory_of_a_graph_that_goes(known: bool) -> None:
    with graphs(), lazily():
        (pipeline,) = kitsune.contexts.here.depth
        for _ in range(6):
            # More than what is copied for who asks.
            y = (torch.ones(64) * 2 + 1).relu()
            kitsune.flush()
        # Of a view that nobody here knows, nobody can tell where it is: then all stay.
        real = y.cell.real
        view = None if known else real[1:3]
        before = real.untyped_storage().data_ptr()
        assert lent_memory(real) is not None
        kitsune.reset()
        assert lent_memory(real) is None
        assert (real.untyped_storage().data_ptr() == before) is not known
        assert pipeline.runner.steady.nbytes == 0 and y.tolist() == [3.0] * 64
        assert view is None or view.tolist() == [3.0] * 2


def test_graphs_that_make_way_are_captured_again_as_often_as_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    rises: list[Any] = []
    monkeypatch.setattr("kitsune.pipeline.would_rise", lambda device, ours: bool(rises))
    with graphs() as repeater, lazily():
        (pipeline,) = kitsune.contexts.here.depth
        for turn in range(MAX_CAPTURES + 1):
            x = torch.ones(4)
            for k in range(5):
                x.add_(1)
                kitsune.flush()
                y = (x * 2 + 1).relu()
                kitsune.flush()
                assert y.tolist() == [2.0 * (k + 2) + 1] * 4, (turn, k)
            alive = repeater.n_alive
            pipeline.make_way()
            assert repeater.n_alive == alive > 0
            rises.append(True)
            pipeline.make_way()
            assert repeater.n_alive == 0 and pipeline.runner.pool.statistics.held_bytes == 0
            rises.clear()
        assert counts("graph_refused") == [{}]


def test_an_allocator_of_the_programs_that_counts_nothing_is_asked_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def counts_nothing(device: torch.device) -> Any:
        raise RuntimeError("this allocator does not yet support getDeviceStats")

    asked = allocator(monkeypatch, reserved=(5000, 5000), allocated=(100, 4000))
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", counts_nothing)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (MIB, 2 * MIB))
    give_back(GPU)
    assert not asked and not would_rise(GPU, 0) and has_room(GPU)
    assert asked_bytes(GPU) == idle_bytes(GPU) == reserved_bytes(GPU) == 0


@pytest.mark.parametrize(("free", "fits"), [(3999, False), (4000, True)])
def test_eager_has_room_where_what_it_once_needed_is_free(free: int, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    allocator(monkeypatch, reserved=(5000, 5000), allocated=(100, 4000))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * MIB, 9000 * MIB))
    assert has_room(GPU) == fits
