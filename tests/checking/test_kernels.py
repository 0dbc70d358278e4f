"""Checks of generated kernels: in Triton's interpreter, and on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kitsune


@pytest.mark.parametrize("how", ["healthy", "off"])
def test_reductions_are_held_to_float64(how: str, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "KITSUNE_NUMERICS": "strict", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "tests.checking.interpret", str(tmp_path), how]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    equal, rounded, kernels = done.stdout.splitlines()[:3]
    assert equal == str(how == "healthy") and int(kernels) >= 6, done.stdout
    if how == "healthy":
        assert int(rounded) == 2, done.stdout
        # A chain in 16 bits: with eager's roundings, and without.
        equal, rounded, fast, unrounded = done.stdout.splitlines()[3].split()
        assert (equal, rounded, fast) == ("True", "0", "True") and int(unrounded), done.stdout
    else:
        assert "from float64, where" in done.stdout and "native_layer_norm.default, " in done.stdout, done.stdout
        assert "interpret.py:" in done.stdout


def training(half: bool) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Dropout(0.1), nn.Linear(16 * 64, 33)
    ).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=half):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(32, 3, 8, 8, generator=generator).cuda(), torch.arange(32).cuda()


@pytest.mark.gpu
@pytest.mark.parametrize("numerics", ["bitwise", "strict", "fast"])
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_a_healthy_step_is_equal_on_the_gpu(half: bool, numerics: str, tmp_path: Path) -> None:
    with kitsune.config.patch(numerics=numerics, cache_dir=tmp_path):
        kitsune.reset()
        report = kitsune.verify(training(half), *batch(), steps=10)
    assert report.equal, str(report)
    assert report.kernels and report.replays > 2, str(report)


@pytest.mark.gpu
def test_a_kernel_that_is_off_is_named_on_the_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from kitsune.codegen.lowering import lower_rules

    rule = lower_rules["relu"]
    monkeypatch.setitem(lower_rules, "relu", replace(rule, lower=lambda c: f"({rule.lower(c)} + 0.25)"))
    x = torch.rand(64, 64, device="cuda")

    def step() -> torch.Tensor:
        y = ((x - 0.5).relu() * 2).exp()
        kitsune.flush()
        return y

    with kitsune.config.patch(cache_dir=tmp_path):
        kitsune.reset()
        (found,) = kitsune.verify(step).differences
    assert (found.operator, Path(found.site.partition(":")[0]).name) == ("aten.relu.default", "test_kernels.py")
    assert Path(found.reproduction).exists()
