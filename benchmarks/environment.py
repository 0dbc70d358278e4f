"""What a measurement was made on, and where its result is kept."""

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import kitsune

RESULTS = Path(__file__).parent / "results"


def environment(device: torch.device) -> dict[str, Any]:
    """Device, versions and commit."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "kitsune": kitsune.__version__,
        "commit": commit.stdout.strip() or None,
    }


def keep(name: str, rows: list[dict[str, Any]], device: torch.device, path: str | None) -> Path:
    """Write the rows with their environment to `path`, by default `results/<name>-<device type>.json`."""
    target = Path(path) if path else RESULTS / f"{name}-{device.type}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({"environment": environment(device), "rows": rows}, indent=1) + "\n")
    return target


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown CPU"
