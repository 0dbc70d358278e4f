"""What `enable_amp=True` costs beside the program's own autocast, in the same loop under the same KitsuneOptimizer.

    python -m benchmarks.bench_amp [--models mlp bert] [--rounds 9] [--steps 20] [--device cuda] [--size full] [--json FILE]

bf16: forward and loss under `torch.autocast` against a loop without it and `enable_amp=True`. fp16: the first with
`torch.amp.GradScaler` against `AMPConfig(dtype=torch.float16)`. Each loop has a process of its own, and they take turns, some
steps each; a figure is the median of its blocks, and the ratio the median of those of neighbouring blocks. `eager` is the first
loop with the plain optimizer. The gate is off, so that both loops are recorded.
"""

import argparse
import contextlib
import gc
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch

import kitsune
from benchmarks.environment import keep
from benchmarks.models import MODELS, Workload, make
from benchmarks.timing import millis
from kitsune.amp import AMPConfig

Step = Callable[[], Any]
LOOPS = ("eager", "own", "enable_amp")
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


def loops(name: str, dtype: torch.dtype, options: Any) -> dict[str, Callable[[], Step]]:
    """What makes each of the three loops, with a model of its own."""

    def workload() -> Workload:
        return make(name, options.device, "amp", options.size, "fused")

    def eager() -> Step:
        loop = workload()
        return by_hand(loop, loop.optimizer, dtype)

    def own() -> Step:
        loop = workload()
        return by_hand(loop, kitsune.KitsuneOptimizer(loop.optimizer, enable_fusion=True), dtype)

    def enable_amp() -> Step:
        loop, config = workload(), AMPConfig(dtype=dtype)
        wrapped = kitsune.KitsuneOptimizer(loop.optimizer, enable_fusion=True, enable_amp=True, amp_config=config)
        return unmodified(loop, wrapped)

    return {"eager": eager, "own": own, "enable_amp": enable_amp}


def serve(options: Any) -> None:
    """One loop in a process of its own: a KitsuneOptimizer watches all forwards of its process. It answers each line that comes
    with the milliseconds of a step."""
    device = torch.device(options.device)
    with kitsune.config.patch(gate=False):
        step = loops(options.models[0], PRECISIONS[options.precisions[0]], options)[options.serve]()
        millis(step, WARM_UP if device.type == "cuda" else 6, device)
        # Until tiles are tried: that would fall into measured steps.
        kitsune.wait_for_kernels(tuned=True)
        millis(step, options.steps, device)
        gc.collect()
        print(json.dumps("ready"), flush=True)
        for _ in sys.stdin:
            counters = kitsune.counters()
            told = {
                "ms": millis(step, options.steps, device),
                "replayed": counters["replayed"],
                "items": counters["flushed"].get("ITEM", 0),
            }
            print(json.dumps(told), flush=True)


class Served:
    """A loop in another process, which runs when it is asked to."""

    def __init__(self, loop: str, name: str, precision: str, options: Any) -> None:
        command = [sys.executable, "-m", "benchmarks.bench_amp", "--serve", loop, "--models", name, "--precisions", precision]
        command += ["--device", options.device, "--size", options.size, "--steps", str(options.steps)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def wait(self) -> None:
        """Until it is warm."""
        self._answer()

    def turn(self) -> dict[str, Any]:
        """Run a block of steps."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._answer()

    def end(self) -> None:
        """The process ends with its input."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(map(str, self._process.args))} has ended with {self._process.wait()}; see above.")  # type: ignore[arg-type]
        return json.loads(line)


def measure(name: str, precision: str, options: Any) -> dict[str, Any]:
    """One row."""
    served = {loop: Served(loop, name, precision, options) for loop in LOOPS}
    for one in served.values():
        one.wait()
    times: dict[str, list[float]] = {loop: [] for loop in LOOPS}
    for _ in range(options.rounds):
        for loop, one in served.items():
            told = one.turn()
            times[loop].append(told["ms"])
    for one in served.values():
        one.end()
    medians = {f"{loop}_ms": round(statistics.median(found), 4) for loop, found in times.items()}
    # They take turns, so that a change of the machine's speed meets all.
    ratios = sorted(ours / own for ours, own in zip(times["enable_amp"], times["own"], strict=True))
    return {
        "model": name,
        "precision": precision,
        **medians,
        "ratio": round(statistics.median(ratios), 4),
        "ratios": [round(ratio, 4) for ratio in ratios],
        "replayed": told["replayed"],
        "items": told["items"],
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
    parser.add_argument("--serve", choices=LOOPS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options)
    rows = []
    print(f"{'model':10s}{'precision':>10s}{'eager ms':>10s}{'own ms':>10s}{'enable_amp':>12s}{'ratio':>8s}{'items':>7s}")
    with contextlib.suppress(KeyboardInterrupt):
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
