"""The benchmarks of the first steps and of many batch sizes run on a CPU and say what is beyond their bounds."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import kitsune
from benchmarks import bench_batch_sizes
from benchmarks.bench_warm_up import COLUMNS, is_slow, marks, median_steps, show

ROOT = Path(__file__).parent.parent.parent


def step(ms: float, **more: Any) -> dict[str, Any]:
    return {"ms": ms, "captured": 0, "replayed": 0, "unfused": 0, "kernels": 0, "gc_ms": 0.0, **more}


def test_a_step_is_marked_with_what_happened_in_it() -> None:
    assert marks(step(1.0), False) == ""
    assert marks(step(1.0, captured=1, replayed=1, unfused=1, gc_ms=0.2), False) == "crug"
    assert [marks(step(1.0, kernels=3), known) for known in (False, True)] == ["k", ""]


@pytest.mark.parametrize("ms, captured, slow", [(14.9, 0, False), (15.1, 0, True), (64.0, 1, False), (66.0, 1, True)])
def test_the_bound_is_eagers_step_and_a_half_and_more_for_a_capture(ms: float, captured: int, slow: bool) -> None:
    assert is_slow(step(ms, captured=captured), step(10.0)) is slow


def test_what_is_shown_names_the_steps_beyond_the_bound(capsys: pytest.CaptureFixture[str]) -> None:
    def row(column: str, *steps: dict[str, Any]) -> dict[str, Any]:
        made = {"model": "mlp", "column": column, "first": list(steps[:2]), "later": list(steps[2:]), "losses": [1.0]}
        return {**made, "kernels_there_s": 0.5, "refused": []}

    ours = row("empty", step(99.0), step(10.0, replayed=1), step(99.0, captured=1))
    show([row("eager", step(10.0), step(10.0), step(10.0)), ours])
    said = capsys.readouterr().out
    assert "replayed from step 2" in said and "beyond the bound: [1, 3]" in said and "first loss equal" in said


def test_of_several_rounds_the_median_of_each_step_is_shown() -> None:
    def row(*ms: float, refused: tuple[str, ...] = ()) -> dict[str, Any]:
        steps = [step(one, captured=int(one)) for one in ms]
        return {"column": "empty", "first": steps[:2], "later": steps[2:], "losses": [1.0], "refused": list(refused)}

    shown = median_steps([row(1.0, 9.0, 5.0), row(3.0, 7.0, 4.0, refused=("so",)), row(2.0, 8.0, 6.0)])
    assert [(one["ms"], one["captured"]) for one in (*shown["first"], *shown["later"])] == [(2.0, 2), (8.0, 8), (5.0, 5)]
    assert shown["refused"] == ["so"]


@pytest.mark.timeout(300)
def test_it_runs_on_a_cpu(tmp_path: Path) -> None:
    target = tmp_path / "found.json"
    command = [sys.executable, "-m", "benchmarks.bench_warm_up", "--device", "cpu", "--json", str(target)]
    command += ["--models", "mlp", "--size", "small", "--steps", "3", "--later", "1", "--rounds", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    rows = json.loads(target.read_text())["rows"]
    assert [row["column"] for row in rows] == [*COLUMNS, *COLUMNS]
    assert all(len(row["first"]) == 3 and len(row["later"]) == 1 for row in rows)
    assert rows[0]["losses"] == rows[1]["losses"] == rows[2]["losses"]


@pytest.mark.timeout(300)
def test_many_batch_sizes_run_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target, in_new_process = tmp_path / "found.json", bench_batch_sizes.in_new_process

    def in_few_processes(column: str, options: argparse.Namespace, folder: str) -> dict[str, Any]:
        """Only what records in a process of its own: torch's import is nearly all that the others would take."""
        if column in ("turns", "kitsune"):
            return in_new_process(column, options, folder)
        return bench_batch_sizes.measure(argparse.Namespace(**{**vars(options), "column": column}))

    monkeypatch.setattr(bench_batch_sizes, "in_new_process", in_few_processes)
    monkeypatch.setattr(kitsune.config, "gate", True)
    command = ["bench_batch_sizes", "--device", "cpu", "--json", str(target), "--sizes", "3", "--rounds", "2", "--processes", "2"]
    monkeypatch.setattr(sys, "argv", command)
    bench_batch_sizes.main()
    rows = json.loads(target.read_text())["rows"]
    assert [row["column"] for row in rows] == ["turns", "turns", "eager", "kitsune", "largest"]
    assert [{name: len(ms) for name, ms in row["ms"].items()} for row in rows] == [
        *({"eager": 6, "kitsune": 6, "again": 6},) * 2,
        {"eager": 6},
        {"kitsune": 6},
        {"eager": 8},
    ]
    assert [bool(row["decided"]) for row in rows] == [True, True, False, True, False], "a CPU's steps are left to eager"
    ms = [{"eager": [9.0, 1.0, 2.0], "kitsune": [9.0, *taken]} for taken in ([3.0, 2.0], [2.0, 3.0], [4.0, 8.0])]
    assert bench_batch_sizes.ratios_of("kitsune", [{"ms": of_process} for of_process in ms], 1) == [1.5, 3.0]
    assert "kitsune: step, times eager's of the same size" in capsys.readouterr().out
