"""What `enable_amp=True` costs beside the program's own autocast, in the same loop under the same KitsuneOptimizer.

    python -m benchmarks.bench_amp [--models mlp bert] [--rounds 9] [--steps 20] [--device cuda] [--size full] [--json FILE]

bf16: forward and loss under `torch.autocast` against a loop without it and `enable_amp=True`. fp16: the first with
`torch.amp.GradScaler` against `AMPConfig(dtype=torch.float16)`. The loops take turns, some steps each; a figure is the median of
its blocks, and the ratio the median of those of neighbouring blocks. `eager` is the first loop with the plain optimizer.
"""

import argparse
import contextlib
import gc
import statistics
from collections.abc import Callable
from typing import Any

import torch

import kitsune
from benchmarks.environment import keep
from benchmarks.models import MODELS, Workload, make
from benchmarks.timing import millis
from kitsune.amp import AMPConfig

Step = Callable[[], Any]
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Until all kernels are there and the region is captured.
WARM_UP = 40


def by_hand(workload: Workload, optimizer: torch.optim.Optimizer, dtype: torch.dtype) -> Step:
    """The loop of a user of torch.amp."""
    device = workload.device.type
    scaler = torch.amp.GradScaler(device, enabled=dtype is torch.float16)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype):
            loss = workload.loss(workload.model, workload.batch)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return step


def unmodified(workload: Workload, optimizer: torch.optim.Optimizer) -> Step:
    """The loop of somebody who knows nothing of mixed precision."""

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        workload.loss(workload.model, workload.batch).backward()
        optimizer.step()

    return step


def loops(name: str, dtype: torch.dtype, options: Any) -> dict[str, Step]:
    """The three loops, each with a model of its own."""

    def workload() -> Workload:
        return make(name, options.device, "amp", options.size, "fused")

    eager, own, ours = workload(), workload(), workload()
    config = AMPConfig(dtype=dtype)
    wrapped = kitsune.KitsuneOptimizer(own.optimizer, enable_fusion=True)
    amp = kitsune.KitsuneOptimizer(ours.optimizer, enable_fusion=True, enable_amp=True, amp_config=config)
    return {
        "eager": by_hand(eager, eager.optimizer, dtype),
        "own": by_hand(own, wrapped, dtype),
        "enable_amp": unmodified(ours, amp),
    }


def measure(name: str, precision: str, options: Any) -> dict[str, Any]:
    """One row."""
    kitsune.reset()
    steps, device = loops(name, PRECISIONS[precision], options), torch.device(options.device)
    for step in steps.values():
        millis(step, WARM_UP if device.type == "cuda" else 6, device)
        # Until tiles are tried: a loop's trials would fall into the other's steps.
        kitsune.wait_for_kernels(tuned=True)
        millis(step, options.steps, device)
    gc.collect()
    times: dict[str, list[float]] = {loop: [] for loop in steps}
    for _ in range(options.rounds):
        for loop, step in steps.items():
            times[loop].append(millis(step, options.steps, device))
    medians = {f"{loop}_ms": round(statistics.median(found), 4) for loop, found in times.items()}
    # The two take turns, so that a change of the machine's speed meets both.
    ratios = sorted(ours / own for ours, own in zip(times["enable_amp"], times["own"], strict=True))
    counters = kitsune.counters()
    return {
        "model": name,
        "precision": precision,
        **medians,
        "ratio": round(statistics.median(ratios), 4),
        "ratios": [round(ratio, 4) for ratio in ratios],
        "replayed": counters["replayed"],
        "items": counters["flushed"].get("ITEM", 0),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=list(PRECISIONS))
    parser.add_argument("--size", default="full", choices=("full", "small"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json")
    options = parser.parse_args()
    rows = []
    print(f"{'model':10s}{'precision':>10s}{'eager ms':>10s}{'own ms':>10s}{'enable_amp':>12s}{'ratio':>8s}{'items':>7s}")
    # Both loops are to be recorded, whatever the gate says of the one or the other.
    with kitsune.config.patch(gate=False), contextlib.suppress(KeyboardInterrupt):
        for name in options.models:
            for precision in options.precisions:
                row = measure(name, precision, options)
                rows.append(row)
                print(
                    f"{name:10s}{precision:>10s}{row['eager_ms']:10.3f}{row['own_ms']:10.3f}{row['enable_amp_ms']:12.3f}"
                    f"{row['ratio']:8.3f}{row['items']:7d}",
                    flush=True,
                )
    print(f"kept in {keep('amp', rows, torch.device(options.device), options.json)}")


if __name__ == "__main__":
    main()
