"""The benchmark of cold starts, as far as it goes without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.bench_cold_start import LAST_STEPS, Times, first_steady

ROOT = Path(__file__).parent.parent.parent


def test_a_recorded_step_is_planned_and_compiled(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    target = tmp_path / "rows.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.bench_cold_start",
        "--device",
        "cpu",
        "--models",
        "mlp-small-amp",
        "--json",
        target,
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert not done.returncode, done.stderr
    (row,) = json.loads(target.read_text())["rows"]
    assert row["model"] == "mlp-small-amp-cpu" and row["kernels"] == row["compiled"] >= 5 and not row["failed"]
    assert row["compile_s"] >= row["compile_span_s"] / 2 > 0 and row["plan_s"] > 0
    assert f"{row['plan_s']:.2f}" in done.stdout and "load_s" not in row


def test_times_are_of_all_calls_failed_ones_included() -> None:
    class Owner:
        def work(self, fails: bool) -> int:
            if fails:
                raise ValueError
            return 7

    times, owner = Times(), Owner()
    times.watch(owner, "work", "compile")
    assert owner.work(False) == 7
    with pytest.raises(ValueError):
        owner.work(True)
    row = times.row()
    assert row["compiled"] == 2 and row["plan_s"] == 0 and 0 <= row["compile_s"] <= row["compile_span_s"] + 0.001


@pytest.mark.parametrize(
    ("first", "number"),
    [
        ([], 0),
        ([0.5, 0.03, 0.011], 2),
        # One fast step among slow ones had luck; a slow one that comes later was unlucky.
        ([0.5, 0.01, 0.03, 0.01, 0.01, 0.01, 0.05], 3),
        # Without its kernels it was replayed, and took 1.5 times as long.
        ([0.5, *[0.015] * 30], 31),
        # So short a time that the clock's own noise is more than a quarter.
        ([0.5, 0.0102], 1),
    ],
)
def test_a_step_is_steady_from_where_it_is_as_fast_as_the_last(first: list[float], number: int) -> None:
    assert first_steady([*first, *[0.01] * LAST_STEPS]) == number


def test_steps_that_are_never_alike_are_not_steady() -> None:
    assert first_steady([0.01 * (1 + 3 * (k % 3 == 0)) for k in range(60)]) is None
    assert first_steady([0.01]) is None
    assert first_steady([0.0001, 0.0001, *[0.0003] * 5, *[0.0001] * LAST_STEPS]) == 0
