"""What the device did while a function ran, from torch.profiler."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

# Categories of the trace that are work on the device; annotations and synchronisations are not.
LAUNCHES = {"kernel": "kernels", "gpu_memcpy": "copies", "gpu_memset": "fills"}


@dataclass(frozen=True)
class Trace:
    """Events of the device in order of their start, as (category, name, microseconds), and the aten calls on the host."""

    launches: list[tuple[str, str, float]]
    aten_calls: int

    def count(self, category: str) -> int:
        """Launches of one of the categories of `LAUNCHES`."""
        return sum(found == category for found, _, _ in self.launches)

    @property
    def micros(self) -> float:
        """Device time of all launches, one after the other."""
        return sum(micros for _, _, micros in self.launches)

    def without(self, name: str) -> Trace:
        """The same but for the launches of this name."""
        return Trace([one for one in self.launches if one[1] != name], self.aten_calls)

    def chunks(self, n: int) -> list[float]:
        """Device time of each of `n` equal runs. Raises RuntimeError if they did not launch equally much."""
        size, rest = divmod(len(self.launches), n)
        if rest or not size:
            raise RuntimeError(f"{n} runs made {len(self.launches)} launches, which is not the same number for each.")
        return [sum(micros for _, _, micros in self.launches[i * size : (i + 1) * size]) for i in range(n)]


def trace(run: Callable[[], Any]) -> Trace:
    """Run under the profiler, on CUDA twice. Needs CUDA for launches; the aten calls are counted everywhere."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
        # The first profile of a process starts CUPTI, which may miss what comes right after. It sees the function itself:
        # an op of another kind would be recorded into its region under Kitsune, which would then be one never seen before.
        with profile(activities=activities):
            run()
            torch.cuda.synchronize()
    with profile(activities=activities) as profiled:
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    on_device = sorted((e for e in events if e.get("cat") in LAUNCHES), key=lambda e: e["ts"])
    calls = sum(e.get("cat") == "cpu_op" and e["name"].startswith("aten::") for e in events)
    return Trace([(e["cat"], e["name"], float(e["dur"])) for e in on_device], calls)
