"""The benchmark of `enable_amp` runs on a CPU, and its two loops train the same."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from benchmarks.bench_amp import loops

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.timeout(300)
def test_it_runs_on_a_cpu(tmp_path: Path) -> None:
    target = tmp_path / "amp.json"
    command = [sys.executable, "-m", "benchmarks.bench_amp", "--device", "cpu", "--size", "small", "--models", "mlp"]
    done = subprocess.run(
        [*command, "--rounds", "1", "--steps", "2", "--json", str(target)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(target.read_text())["rows"]
    assert [row["precision"] for row in rows] == ["bf16", "fp16"]
    assert all(row[f"{loop}_ms"] > 0 for row in rows for loop in ("eager", "own", "enable_amp"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loops_train_the_same(dtype: torch.dtype) -> None:
    """With the loss outside of autocast, which cross entropy computes in float32 either way."""
    steps = loops("mlp", dtype, Namespace(device="cpu", size="small"))
    weights = []
    for begin in steps.values():
        step = begin()
        for _ in range(3):
            step()
        workload = step.__closure__ and next(c.cell_contents for c in step.__closure__ if hasattr(c.cell_contents, "model"))
        weights.append([p.detach().clone() for p in workload.model.parameters()])
    for others in weights[1:]:
        assert all(torch.equal(a, b) for a, b in zip(weights[0], others, strict=True))
