"""The benchmark of cold starts, as far as it goes without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.bench_cold_start import Times

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
