"""The kernels that a captured graph begins with, in Triton's interpreter, against their like in plain Python."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", minversion="3.7", reason="an interpreter that works with NumPy of today")


def test_pages_are_read_and_tensors_copied_byte_for_byte(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.codegen.interpret_pages", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not done.stdout, done.stdout[:4000]
