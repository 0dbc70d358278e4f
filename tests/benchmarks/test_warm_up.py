"""The benchmarks of the first steps and of many batch sizes run on a CPU and say what is beyond their bounds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.bench_warm_up import COLUMNS, is_slow, marks, show

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


@pytest.mark.parametrize("name, more", [("warm_up", ["--models", "mlp", "--size", "small"]), ("batch_sizes", ["--sizes", "3"])])
def test_it_runs_on_a_cpu(name: str, more: list[str], tmp_path: Path) -> None:
    target, few = tmp_path / "found.json", ["--steps", "3", "--later", "1"] if name == "warm_up" else ["--rounds", "2"]
    command = [sys.executable, "-m", f"benchmarks.bench_{name}", "--device", "cpu", "--json", str(target), *more, *few]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    rows = json.loads(target.read_text())["rows"]
    if name == "warm_up":
        assert [row["column"] for row in rows] == list(COLUMNS)
        assert all(len(row["first"]) == 3 and len(row["later"]) == 1 for row in rows)
        assert rows[0]["losses"] == rows[1]["losses"] == rows[2]["losses"]
    else:
        assert [len(row["ms"]) for row in rows] == [6, 6, 6, 8]
