"""The benchmark of static functions runs on a CPU, and stops where it would time something else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_it_times_replays_of_both_ways(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "benchmarks.bench_static",
        "--layers",
        "2",
        "--calls",
        "50",
        "--json",
        str(tmp_path / "rows"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows").read_text())["rows"]
    assert [(row["way"], row["held"]) for row in rows] == [(w, h) for w in ("static", "loop") for h in (False, True)]
    assert all(0 < row["quartiles_us"][0] <= row["us"] <= row["quartiles_us"][1] for row in rows)
