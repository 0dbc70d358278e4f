"""Random programs with reductions, by plan in Triton's interpreter: as near to float64 as eager is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

pytest.importorskip("triton", minversion="3.7", reason="an interpreter that works with NumPy of today")

EXAMPLES = settings().max_examples // 2


def test_plans_with_reductions_are_as_near_to_float64_as_eager(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.property.reductions", str(tmp_path), str(EXAMPLES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    assert int(done.stdout) > EXAMPLES, "most programs have kernels with reductions"
