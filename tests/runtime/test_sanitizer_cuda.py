"""compute-sanitizer over a kernel of every rule, where it is installed (it comes with the CUDA toolkit)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

PLACES = [shutil.which("compute-sanitizer"), *(f"{os.environ.get(name, '')}/bin/compute-sanitizer" for name in ("CUDA_HOME",))]
SANITIZER = next(
    (place for place in [*PLACES, "/usr/local/cuda/bin/compute-sanitizer"] if place and os.access(place, os.X_OK)), None
)


@pytest.mark.skipif(SANITIZER is None, reason="compute-sanitizer is not installed: it comes with the CUDA toolkit")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_no_kernel_is_told(tool: str, tmp_path: Path) -> None:
    # Memory of torch's and of Kitsune's own pools would hide what goes beyond the end of a tensor.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "KITSUNE_POOL": "0"}
    command = [
        str(SANITIZER),
        "--tool",
        tool,
        "--error-exitcode",
        "9",
        sys.executable,
        "-m",
        "tests.runtime.sanitized",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    # The race checker says it in words of its own.
    assert "ERROR SUMMARY: 0 errors" in done.stdout or "0 hazards displayed (0 errors" in done.stdout
