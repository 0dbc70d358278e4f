"""Tiles by measurement, without a device: what is timed, when, where and on which memory, and what comes of it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

import kitsune
from kitsune.config import config
from kitsune.ir import Pending, Tile
from kitsune.runtime.trials import PATIENCE, ROUNDS
from tests.runtime.backends import lazily, runner
from tests.runtime.repeated import counts
from tests.runtime.tuned import products, second_is_fastest, steps, tuned

NAMES = ["tiles_tried", "tiles_changed", "tiles_untried"]
FIRST, SECOND = Tile(1024, 0, 4), Tile(512, 0, 4)
# Replays until all is tried: two until it begins, and for each of two kernels one that asks, five rounds and two that look.
ENOUGH = 30


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    with kitsune.disable():
        return products()


def same(found: list[torch.Tensor], expected: torch.Tensor) -> bool:
    return all(torch.equal(t, expected) for t in found)


def equally_fast(kernel: str, tile: Tile) -> float:
    return 1e-5 if tile == FIRST else 0.98e-5


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def planned() -> set[Tile | None]:
    """The tiles of what is run now."""
    (ready,) = runner().ready.values()
    return {launch.tile for launch in ready.plan.plan.launches if launch.kernels}


def test_the_fastest_tile_is_taken_and_the_region_captured_once_more(tmp_path: Path, expected: torch.Tensor) -> None:
    with tuned(tmp_path) as device:
        assert same(steps(ENOUGH), expected)
        assert counts(*NAMES, "captured") == [2, 2, 0, 2] and not counts("graph_refused")[0]
        n_started = len(device.started)
        assert same(steps(ENOUGH), expected) and counts("captured") == [2]
        assert len(device.started) == n_started, "nothing is timed again, and what is replayed starts nothing"
        assert planned() == {SECOND}, "what was captured has the new tiles"
        assert len(files(tmp_path)) == 2


def test_each_round_starts_every_tile_once_and_begins_with_another(tmp_path: Path) -> None:
    with tuned(tmp_path) as device:
        steps(ENOUGH)
    name = device.started[0][0]
    tiles = [tile for kernel, tile in device.started if kernel == name]
    n = len(set(tiles))
    assert n == 6 and tiles[:n] == tiles[n : 2 * n], "first starts, and the first round"
    rounds = [tiles[k : k + n] for k in range(n, (ROUNDS + 1) * n, n)]
    assert len({one[0] for one in rounds}) == ROUNDS and all(set(one) == set(tiles) for one in rounds)


def test_a_second_process_begins_with_what_the_first_has_found(tmp_path: Path, expected: torch.Tensor) -> None:
    with tuned(tmp_path):
        steps(ENOUGH)
    with tuned(tmp_path) as device:
        assert same(steps(4), expected)
        assert {tile for _, tile in device.captured} == {SECOND} and counts(*NAMES, "captured") == [2, 2, 0, 1]
        assert "512 by 4 warps, remembered; timed were 1024 by 4 warps 10.0 us" in str(kitsune.explain())
        assert [line.remembered for line in kitsune.explain().tiles] == [True, True]
        assert same(steps(ENOUGH), expected) and counts("captured") == [1]


def test_what_is_not_clearly_faster_is_not_taken(tmp_path: Path, expected: torch.Tensor) -> None:
    with tuned(tmp_path, equally_fast):
        assert same(steps(ENOUGH), expected)
        assert counts(*NAMES, "captured") == [2, 0, 0, 1]
    with tuned(tmp_path, equally_fast) as device:
        steps(ENOUGH)
        assert not device.started, "that the first choice is the fastest is remembered as well"


def test_a_region_that_comes_later_has_the_tile_at_once(tmp_path: Path) -> None:
    with tuned(tmp_path) as device:
        steps(ENOUGH)
        del device.captured[:]
        steps(3, lambda: products().abs())
        assert {tile for name, tile in device.captured if name == "relu_mul_sub"} == {SECOND}


@pytest.mark.parametrize("knobs", [{"tuning": "off"}, {"compile_workers": 0}], ids=str)
def test_nothing_is_timed_without_workers_or_with_the_knob_off(knobs: dict[str, Any], tmp_path: Path) -> None:
    with tuned(tmp_path, **knobs) as device:
        steps(ENOUGH)
        assert not device.started and counts(*NAMES) == [0, 0, 0] and not files(tmp_path)


def test_with_the_knob_off_nothing_that_is_remembered_is_taken(tmp_path: Path) -> None:
    with tuned(tmp_path):
        steps(ENOUGH)
    with tuned(tmp_path, tuning="off") as device:
        steps(4)
        assert not device.captured
        with config.patch(tuning="on"):
            steps(4)
        assert {tile for _, tile in device.captured} == {SECOND}


def test_switched_off_in_the_middle_the_first_choices_are_back(tmp_path: Path, expected: torch.Tensor) -> None:
    with tuned(tmp_path) as device:
        steps(ENOUGH)
        assert counts("captured") == [2]
        n_started = len(device.started)
        with config.patch(tuning="off"):
            assert same(steps(6), expected)
        assert counts("captured") == [3] and len(device.started) == n_started, "another value of the knob is another plan"


def test_a_region_is_not_timed_before_it_has_been_replayed_long_enough(tmp_path: Path) -> None:
    with tuned(tmp_path, after=1000) as device:
        steps(ENOUGH)
        assert counts("replayed")[0] > 20 and not device.started and counts(*NAMES) == [0, 0, 0]


def test_no_step_waits_for_programs_or_for_the_device(tmp_path: Path, expected: torch.Tensor) -> None:
    with tuned(tmp_path) as device:
        device.is_through = False
        assert same(steps(ENOUGH), expected)
        assert len(device.started) == 12, "one round of one kernel, after its first starts"
        assert counts(*NAMES) == [0, 0, 2]
        device.is_through = True
        assert same(steps(ENOUGH), expected) and counts(*NAMES) == [2, 2, 0]


def test_what_another_thread_has_found_out_is_not_timed_again(tmp_path: Path, expected: torch.Tensor) -> None:
    with tuned(tmp_path) as device:
        device.is_through = False
        steps(8)
        name, n_started = device.started[0][0], len(device.started)
        tuner = runner().tuner
        (subject,) = (ready.subject for ready in runner().ready.values())
        tuner.choices.keep(subject.trial.launch.kernels[0], {FIRST: 1e-5, Tile(2048, 0, 8): 1e-6})
        device.is_through = True
        assert same(steps(ENOUGH), expected) and counts(*NAMES) == [2, 2, 0]
        assert not [kernel for kernel, _ in device.started[n_started:] if kernel == name], "nothing is timed"
        assert Tile(2048, 0, 8) in planned()


def test_programs_that_do_not_come_keep_nothing_else_back(tmp_path: Path, expected: torch.Tensor) -> None:
    with tuned(tmp_path, after=6) as device:
        assert same(steps(5), expected)
        device.held = {"relu_mul_sub", "add_relu_mul"}
        assert same(steps(ENOUGH), expected)
        assert counts(*NAMES, "captured", "compiling") == [0, 0, 2, 1, 0] and not device.started


def test_a_tile_that_cannot_be_started_is_left_out(tmp_path: Path, expected: torch.Tensor) -> None:
    with tuned(tmp_path) as device:
        device.broken[("relu_mul_sub", SECOND)] = RuntimeError("out of resource: shared memory")
        assert same(steps(ENOUGH), expected)
        (line,) = [line for line in kitsune.explain().tiles if line.kernel == "relu_mul_sub"]
        assert line.tile == str(FIRST) and str(SECOND) not in line.micros and len(line.micros) == 5
        assert not kitsune.explain().mended


def test_nothing_is_kept_of_a_kernel_whose_first_choice_cannot_be_started(tmp_path: Path, expected: torch.Tensor) -> None:
    with tuned(tmp_path) as device:
        device.broken[("relu_mul_sub", FIRST)] = RuntimeError("of no use")
        assert same(steps(ENOUGH), expected)
        assert counts(*NAMES) == [1, 1, 0] and len(files(tmp_path)) == 1


def test_a_timer_that_fails_ends_a_trial_with_a_sentence(tmp_path: Path, expected: torch.Tensor) -> None:
    def fail(kernel: str, tile: Tile) -> float:
        raise torch.OutOfMemoryError("no memory")

    with tuned(tmp_path, fail):
        assert same(steps(ENOUGH), expected)
        assert "No other tiles were timed for relu_mul_sub: OutOfMemoryError: no memory." in kitsune.explain().notes
        assert counts(*NAMES) == [0, 0, 0]


def test_where_no_arena_has_room_nothing_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kitsune.runtime.graph_work.Arenas.scratch", lambda *_: None)
    monkeypatch.setattr("kitsune.tuning.OWN_BYTES", 1 << 10)
    with tuned(tmp_path) as device:
        steps(ENOUGH)
        assert not device.started and "more than an arena has" in str(kitsune.explain())
        assert kitsune.wait_for_kernels(60.0, tuned=True)


def test_where_no_arena_has_room_and_the_most_ever_would_rise_nothing_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr("kitsune.runtime.graph_work.Arenas.scratch", lambda *_: None)
    monkeypatch.setattr("kitsune.tuning.was_lent", lambda device, nbytes: asked.append(nbytes))
    with tuned(tmp_path) as device:
        steps(ENOUGH)
        assert min(asked) >= 128 * 16 * 4 and not device.started and "more than an arena has" in str(kitsune.explain())


def test_who_waits_for_trials_has_them_take_what_they_want(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kitsune.runtime.graph_work.Arenas.scratch", lambda *_: None)
    monkeypatch.setattr("kitsune.tuning.OWN_BYTES", 0)
    monkeypatch.setattr("kitsune.tuning.was_lent", lambda device, nbytes: False)
    with tuned(tmp_path, after=10 * ENOUGH):
        steps(ENOUGH)
        assert counts("tiles_tried") == [0] and kitsune.wait_for_kernels(60.0, tuned=True) and counts(*NAMES) == [2, 2, 0]


def test_a_little_memory_is_taken_where_no_arena_has_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kitsune.runtime.graph_work.Arenas.scratch", lambda *_: None)
    with tuned(tmp_path):
        steps(ENOUGH)
        assert counts(*NAMES) == [2, 2, 0]


def test_trials_take_no_memory_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: set[int] = set()
    monkeypatch.setattr("kitsune.runtime.Trial.round", lambda trial, memory, timer, stream: used.add(memory.data_ptr()))
    with tuned(tmp_path):
        steps(6)
        (arena,) = runner().arenas._alive
        assert used == {arena.address}


@pytest.mark.parametrize("broken", ["", "[[", '[["a", 0, 4, 1.0]]\n# sha256 0'])
def test_a_damaged_file_counts_as_none(broken: str, tmp_path: Path, expected: torch.Tensor) -> None:
    with tuned(tmp_path):
        steps(ENOUGH)
    for path in files(tmp_path):
        path.write_text(broken)
    with tuned(tmp_path) as device:
        assert same(steps(ENOUGH), expected) and device.started and counts(*NAMES) == [2, 2, 0]


def test_a_folder_that_cannot_be_written_is_no_harm(tmp_path: Path, expected: torch.Tensor) -> None:
    (tmp_path / "file").write_text("no folder")
    with tuned(tmp_path / "file"):
        assert same(steps(ENOUGH), expected)
        assert counts(*NAMES, "captured") == [2, 2, 0, 2] and not kitsune.explain().mended


def test_a_program_that_is_never_there_is_given_up(tmp_path: Path) -> None:
    with tuned(tmp_path, after=3) as device:
        device.broken[("relu_mul_sub", SECOND)] = Pending("relu_mul_sub")
        steps(PATIENCE + ENOUGH)
        (line,) = [line for line in kitsune.explain().tiles if line.kernel == "relu_mul_sub"]
        assert str(SECOND) not in line.micros


def test_reset_forgets_what_was_tried_but_not_what_is_remembered(tmp_path: Path) -> None:
    with tuned(tmp_path) as device:
        steps(8)
        assert counts(*NAMES)[2] > 0
        kitsune.reset()
        assert counts(*NAMES) == [0, 0, 0]
        steps(ENOUGH)
        assert counts(*NAMES) == [2, 2, 0] and device.started


def test_pauses_between_rounds_keep_to_their_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, times = [0.0], []

    def takes(kernel: str, tile: Tile) -> float:
        times.append(now[0])
        return second_is_fastest(kernel, tile)

    with tuned(tmp_path, takes):
        with lazily():
            products()
        monkeypatch.setattr("kitsune.tuning.SHARE", 0.01)
        runner().tuner._clock = lambda: now[0]
        for _ in range(40):
            steps(1)
            now[0] += 1e-3
    starts = sorted(set(times))
    # Six starts of 25 us each, and nearly no bytes.
    assert len(starts) >= 2 and min(b - a for a, b in itertools.pairwise(starts)) == pytest.approx(15e-3, rel=0.1)


def test_a_measurement_can_have_everything_tried_at_once(tmp_path: Path, expected: torch.Tensor) -> None:
    with tuned(tmp_path, after=1000):
        assert same(steps(5), expected) and counts("captured") == [1]
        with lazily():
            pending = torch.ones(4) + 1
            # What times tiles is no part of the program.
            assert kitsune.wait_for_kernels(60.0, tuned=True)
        assert counts(*NAMES) == [2, 2, 0] and pending.tolist() == [2.0] * 4
        assert same(steps(3), expected) and counts("captured") == [2]


def test_waiting_for_trials_ends_in_time(tmp_path: Path) -> None:
    with tuned(tmp_path, after=1000) as device:
        steps(5)
        device.is_through = False
        assert not kitsune.wait_for_kernels(0.2, tuned=True)
        assert counts("tiles_untried") == [2]
