"""Launches, operators, peak memory and time of a training step: eager, Kitsune without fusion, Kitsune with fusion.

    python -m benchmarks.bench_launches [--models bert,gpt2,vit,resnet50] [--configurations eager,...] [--json FILE]

Each configuration of each model is a process of its own, so that one does not inherit the other's memory. `eager again` is the
same as eager: how far its losses are from eager's is what the device itself does not reproduce. Launches (kernels, copies and
fills) are counted by torch.profiler and need CUDA; the rest can be tried with `--device cpu --size small`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kitsune
from benchmarks.bench_planning import distinct_kernels, refusals_by_reason
from benchmarks.device_trace import Trace, trace
from benchmarks.environment import keep
from benchmarks.models import MODELS, make

CONFIGURATIONS = ("eager", "eager again", "unfused", "fused")
# Optimizer state, a region's observation, and kernels that are compiled when they are first needed.
WARM_UP = 6
SAMPLES = 10
Step = Callable[[], Tensor]


class CountCalls(TorchDispatchMode):
    """Counts what reaches the dispatcher below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n += 1
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def configured(configuration: str, device: torch.device) -> Iterator[None]:
    """The context in which the steps of a configuration run."""
    if configuration.startswith("eager"):
        yield
        return
    with kitsune.config.patch(fuse=configuration == "fused"), kitsune.accelerate(device=device):
        yield


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def step_seconds(step: Step, inner: int, device: torch.device) -> list[float]:
    """Seconds per step, in samples of `inner` steps that the host may run ahead in, as it does in a training loop."""
    taken = []
    for _ in range(SAMPLES):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(inner):
            step()
        synchronize(device)
        taken.append((time.perf_counter() - start) / inner)
    return taken


def ops_called(step: Step, eager: bool) -> dict[str, int]:
    """Operators of one step: all that are dispatched in eager; by Kitsune's own counters under Kitsune."""
    if eager:
        with CountCalls() as counted:
            step()
        return {"called": counted.n}
    before = kitsune.counters()
    step()
    after = kitsune.counters()
    return {name: n - before[name] for name, n in after.items() if isinstance(n, int) and isinstance(before.get(name), int)}


def device_work(step: Step, device: torch.device) -> dict[str, Any]:
    """Launches of one step by category, and their time; aten calls that the profiler saw, nested ones included."""
    seen = trace(step)
    row: dict[str, Any] = {"aten_calls_nested": seen.aten_calls}
    if device.type != "cuda":
        return row
    names = {name for category, name, _ in seen.launches if category == "kernel"}
    return row | {
        "launches": len(seen.launches),
        "kernels": seen.count("kernel"),
        "copies": seen.count("gpu_memcpy"),
        "fills": seen.count("gpu_memset"),
        "kernel_names": len(names),
        "device_ms": round(seen.micros / 1e3, 3),
        "longest": longest(seen),
    }


def longest(seen: Trace, n: int = 30) -> list[tuple[str, int, float]]:
    """The launches that take the most time together: name, how many, microseconds."""
    count: Counter[str] = Counter()
    micros: Counter[str] = Counter()
    for _, name, taken in seen.launches:
        count[name] += 1
        micros[name] += taken  # type: ignore[assignment]
    return [(name[:120], count[name], round(total, 1)) for name, total in micros.most_common(n)]


def memory(step: Step, device: torch.device) -> dict[str, Any]:
    """Peak of the warm-up and of three steps after it, and what lies there between steps."""
    if device.type != "cuda":
        return {}
    first = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    between = torch.cuda.memory_allocated(device)
    for _ in range(3):
        step()
    synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    reserved = torch.cuda.max_memory_reserved(device)
    return {"peak_bytes": peak, "peak_first_bytes": first, "between_steps_bytes": between, "peak_reserved_bytes": reserved}


def planned() -> dict[str, Any]:
    """What `kitsune.last_plan()` says, if this version has it and a region was planned."""
    last_plan = getattr(kitsune, "last_plan", None)
    plan = last_plan() if last_plan is not None else None
    if plan is None:
        return {}
    return {
        "planned_launches": plan.n_launches,
        "arena_bytes": plan.arena,
        "generated_kernels": sum(len(launch.kernels) for launch in plan.launches),
        "distinct_kernels": distinct_kernels(plan),
        "refusals": refusals_by_reason(plan),
    }


def measure(model: str, configuration: str, options: argparse.Namespace) -> dict[str, Any]:
    """One row; to be called in a fresh process."""
    device = torch.device(options.device)
    eager = configuration.startswith("eager")
    workload = make(model, device, options.precision, options.size)
    row: dict[str, Any] = {"model": model, "configuration": configuration}
    with configured(configuration, device):
        start = time.perf_counter()
        losses = [workload.step() for _ in range(WARM_UP)]
        synchronize(device)
        row["warm_up_s"] = round(time.perf_counter() - start, 2)
        row |= memory(workload.step, device)
        seconds = step_seconds(workload.step, options.inner, device)
        row |= {"step_ms": _ms(statistics.median(seconds)), "step_range_ms": [_ms(min(seconds)), _ms(max(seconds))]}
        row["ops"] = ops_called(workload.step, eager)
        row |= {} if eager else planned()
        row |= device_work(workload.step, device)
        losses.append(workload.step())
        row["losses"] = [loss.item() for loss in losses]
    return row


def in_new_process(model: str, configuration: str, options: argparse.Namespace) -> dict[str, Any]:
    """`measure` in a process of its own. What goes wrong there is the row's `error`."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "row.json"
        command = [sys.executable, "-m", "benchmarks.bench_launches", "--models", model, "--configurations", configuration]
        command += ["--device", options.device, "--size", options.size, "--precision", options.precision]
        command += ["--inner", str(options.inner), "--row", str(target)]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent)
        if done.returncode == 0:
            row: dict[str, Any] = json.loads(target.read_text())
            return row
    return {"model": model, "configuration": configuration, "error": done.stderr.strip()[-2000:] or f"exit {done.returncode}"}


def compare(rows: list[dict[str, Any]]) -> None:
    """Add to each row how far its losses are from those of its model in eager."""
    eager = {row["model"]: row["losses"] for row in rows if row["configuration"] == "eager" and "losses" in row}
    for row in rows:
        if row["model"] in eager and "losses" in row:
            apart = [abs(a - b) for a, b in zip(row["losses"], eager[row["model"]], strict=True)]
            row["losses_apart"] = max(apart)
            row["losses_equal"] = row["losses"] == eager[row["model"]]


def show(row: dict[str, Any]) -> None:
    """A row as a line."""
    head = f"{row['model']:9s}{row['configuration']:12s}"
    if "error" in row:
        print(f"{head} failed: {row['error'].splitlines()[-1]}", flush=True)
        return
    low, high = row["step_range_ms"]
    peak = f"{row['peak_bytes'] / 2**30:8.2f}" if "peak_bytes" in row else f"{'-':>8s}"
    ops = row["ops"].get("called", row["ops"].get("recorded", 0))
    print(
        f"{head}{row.get('launches', '-'):>9}{ops:7d}{peak}{row['step_ms']:10.2f} ({low:.2f} to {high:.2f})"
        f"{row.get('device_ms', '-'):>10}{row.get('distinct_kernels', '-'):>9}",
        flush=True,
    )


def show_losses(rows: list[dict[str, Any]]) -> None:
    """How far each configuration's losses are from eager's."""
    for row in rows:
        if "losses_apart" in row and row["configuration"] != "eager":
            told = "equal eager's" if row["losses_equal"] else f"differ from eager's by up to {row['losses_apart']:.3g}"
            print(f"{row['model']}, {row['configuration']}: losses {told}")


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)


def main() -> None:
    """Measure every configuration of every model, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="bert,gpt2,vit,resnet50", help=f"'all', or some of {','.join(MODELS)}")
    parser.add_argument("--configurations", default=",".join(CONFIGURATIONS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=("small", "full"), default="full")
    parser.add_argument("--precision", choices=("amp", "fp32"), default="amp")
    parser.add_argument("--inner", type=int, default=5, help="steps in each of the samples (%(default)s)")
    parser.add_argument("--json")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    models = MODELS if options.models == "all" else options.models.split(",")
    if options.row:
        row = measure(models[0], options.configurations, options)
        Path(options.row).write_text(json.dumps(row))
        return
    device = torch.device(options.device)
    if device.type != "cuda":
        print("Without CUDA launches, device time and peak memory are not measured: they need a GPU.")
    print(f"{'model':9s}{'':12s}{'launches':>9s}{'ops':>7s}{'peak GiB':>8s}{'step ms':>10s}{'device ms':>28s}{'kernels':>9s}")
    rows = []
    for model in models:
        for configuration in options.configurations.split(","):
            rows.append(in_new_process(model, configuration, options))
            show(rows[-1])
    compare(rows)
    show_losses(rows)
    print(f"kept in {keep('launches', rows, device, options.json)}")
    if any("error" in row for row in rows):
        sys.exit("Some configurations failed; their errors are in the file.")


if __name__ == "__main__":
    main()
