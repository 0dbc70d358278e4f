"""Models that several processes train together: collectives are no operators of aten, and C++ reads and writes gradients."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.chaos.counting import Counts, many

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_ranks_train_as_in_eager(device: str, counts: Counts) -> None:
    """Every way to share gradients and parameters, by two processes: each loss, parameter, buffer and state."""
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    command = [sys.executable, "-W", "ignore", "-m", "tests.chaos.distributed", device, str(many(8, 100))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert len(found) > 30
    for name, told in found.items():
        counts.compare(name, None, told)
