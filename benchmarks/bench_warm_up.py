"""The first steps of a training, one by one: eager's beside Kitsune's, with empty and with warm caches on disk.

    python -m benchmarks.bench_warm_up --models mlp,bert [--steps 12] [--rounds 3] [--workers auto] [--schedule cosine]

Every model and column has a process of its own; `warm` finds on disk what `empty` has left there. Each step ends with a wait
for the device, and is shown with what happened in it:

    c  captured    r  replayed    u  run unfused, for want of kernels    k  the first run by plan    g  a full garbage collection

With several rounds, each with caches of its own, a step shown is that of the round in which it took its median time: a step of
1.5 ms may take twice as long in one process, eager's as well as ours. A step is marked `!` if it takes more than 1.5 times
eager's step of that number, with 50 ms more for one that captures.
After these steps the program waits for its kernels and does a few more, which show what their arrival costs.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import RESULTS, keep
from benchmarks.models import MODELS, make, make_batches
from benchmarks.train_step.columns import forward_of, make_step

ROOT = Path(__file__).parent.parent
COLUMNS = ("eager", "empty", "warm")
CACHES = ("KITSUNE_CACHE_DIR", "TRITON_CACHE_DIR")
N_BATCHES = 4
# The bounds of a warm-up step: times eager's, and milliseconds more for one that captures.
TIMES, CAPTURE_MS = 1.5, 50.0
COUNTED = ("captured", "replayed", "unfused", "kernels")


class Collections:
    """Milliseconds spent in full garbage collections, which a large program has 0.1 s for, whatever its step is at."""

    def __init__(self) -> None:
        self.ms, self._start = 0.0, 0.0
        gc.callbacks.append(self._hear)

    def _hear(self, phase: str, info: dict[str, int]) -> None:
        if info["generation"] == 2:
            if phase == "stop":
                self.ms += (time.perf_counter() - self._start) * 1e3
            self._start = time.perf_counter()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One model in one column, in this process: its steps, and those after all kernels are there."""
    import kitsune

    device = torch.device(options.device)
    workload = make(options.models[0], device, options.precision, options.size)
    batches = make_batches(options.models[0], device, N_BATCHES, options.size)
    step, read = make_step(workload, forward_of(workload), "every 20"), kitsune.counters
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(workload.optimizer, 1000) if options.schedule == "cosine" else None
    collections, n_done, losses = Collections(), 0, []

    def steps(n: int) -> list[dict[str, Any]]:
        nonlocal n_done
        found = []
        for _ in range(n):
            before, collected = read(), collections.ms
            _synchronize(device)
            start, cpu = time.perf_counter(), time.thread_time()
            losses.append(step(*batches[n_done % N_BATCHES]))
            if schedule is not None:
                schedule.step()
            host, cpu = time.perf_counter() - start, time.thread_time() - cpu
            _synchronize(device)
            row = {"ms": time.perf_counter() - start, "host_ms": host, "cpu_ms": cpu}
            row = {name: round(seconds * 1e3, 3) for name, seconds in row.items()}
            now = read()
            row |= {name: now[name] - before[name] for name in COUNTED}
            found.append(row | {"compiling": now["compiling"], "gc_ms": round(collections.ms - collected, 3)})
            n_done += 1
        return found

    eager = options.column == "eager"
    with contextlib.nullcontext() if eager else kitsune.accelerate(device=device):
        start = time.perf_counter()
        row: dict[str, Any] = {"first": steps(options.steps)}
        if not eager:
            kitsune.wait_for_kernels(120)
            row["kernels_there_s"] = round(time.perf_counter() - start, 3)
        row["later"] = steps(options.later)
    row["losses"] = [float(f"{loss.item():.9g}") for loss in losses]
    row["refused"] = list(read()["graph_refused"])
    return row


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_new_process(model: str, column: str, caches: dict[str, str], options: argparse.Namespace) -> dict[str, Any]:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.bench_warm_up", "--column", column, "--models", model]
    for name in ("steps", "later", "schedule", "device", "size", "precision"):
        command += [f"--{name}", str(getattr(options, name))]
    environment = {**os.environ, **caches, "KITSUNE_GATE": "0"}
    if options.workers != "default":
        environment["KITSUNE_COMPILE_WORKERS"] = "none" if options.workers == "auto" else options.workers
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=options.timeout)
    if done.returncode:
        sys.exit(f"{model}, {column}: exit {done.returncode}\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {"model": model, "column": column, "schedule": options.schedule, "workers": options.workers, **found}


def marks(step: dict[str, Any], known_kernels: bool) -> str:
    """What happened in a step, as letters."""
    letters = [letter for letter, name in (("c", "captured"), ("r", "replayed"), ("u", "unfused")) if step[name]]
    letters += ["k"] if step["kernels"] and not known_kernels else []
    return "".join(letters + (["g"] if step["gc_ms"] else []))


def is_slow(step: dict[str, Any], eager: dict[str, Any]) -> bool:
    """Is a step beyond the bound?"""
    return bool(step["ms"] > TIMES * eager["ms"] + CAPTURE_MS * bool(step["captured"]))


def median_steps(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """A column's row, of each step the one with the median time among the rounds (the slower of two in the middle)."""
    found = {**rounds[0], "refused": sorted({why for row in rounds for why in row["refused"]})}
    for part in ("first", "later"):
        found[part] = [
            sorted(steps, key=lambda step: step["ms"])[len(steps) // 2]
            for steps in zip(*(row[part] for row in rounds), strict=True)
        ]
    return found


def show(rows: list[dict[str, Any]]) -> None:
    """A model's columns side by side, a line per step."""
    eager, others = rows[0], rows[1:]
    print(f"\n{eager['model']}: ms per step" + "".join(f"{row['column']:>22s}" for row in rows))
    all_steps = [[*row["first"], *row["later"]] for row in rows]
    known = [False] * len(rows)
    for n, (own, *theirs) in enumerate(zip(*all_steps, strict=True)):
        line = f"{'later ' if n >= len(eager['first']) else ''}{n + 1:>{18 if n < len(eager['first']) else 12}d}{own['ms']:22.1f}"
        for k, step in enumerate(theirs):
            text = f"{step['ms']:.1f} {marks(step, known[k]):>5s} {'!' if is_slow(step, own) else ' '}"
            known[k] = known[k] or bool(step["kernels"])
            line += f"{text:>22s}"
        print(line)
    for row in others:
        steps = [*row["first"], *row["later"]]
        replayed = next((n + 1 for n, step in enumerate(steps) if step["replayed"]), None)
        slow = [n + 1 for n, (step, own) in enumerate(zip(steps, all_steps[0], strict=True)) if is_slow(step, own)]
        same = row["losses"][0] == eager["losses"][0]
        print(
            f"  {row['column']}: replayed from step {replayed}, kernels there after {row['kernels_there_s']:.2f} s, steps beyond "
            f"the bound: {slow or 'none'}, first loss {'equal' if same else 'NOT equal'}, refused: {row['refused'] or 'nothing'}"
        )


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", type=lambda text: text.split(","), default=["bert"], help="some of " + ",".join(MODELS))
    add("--steps", type=int, default=12)
    add("--later", type=int, default=8, help="steps after the kernels are there (%(default)s)")
    add("--rounds", type=int, default=1, help="processes of each column (%(default)s)")
    add("--schedule", choices=("constant", "cosine"), default="constant", help="of the learning rate")
    add("--workers", default="default", help="KITSUNE_COMPILE_WORKERS: a number, 'auto' or 'default' (%(default)s)")
    add("--precision", choices=("amp", "fp32"), default="amp")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--size", choices=("small", "full"), default="full")
    add("--timeout", type=float, default=300.0, help="seconds that a process may take (%(default)s)")
    add("--json")
    add("--column", choices=COLUMNS, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure and print; with --column, one process's part of it."""
    options = parse()
    if options.column:
        print(json.dumps(measure(options)))
        return
    rows: list[dict[str, Any]] = []
    device = torch.device(options.device)
    target = options.json or str(RESULTS / f"warm-up-{device.type}.json")
    for model in options.models:
        rounds = []
        for _ in range(options.rounds):
            with tempfile.TemporaryDirectory() as folder:
                caches = {variable: str(Path(folder) / variable) for variable in CACHES}
                rounds.append([in_new_process(model, column, caches, options) for column in COLUMNS])
        show([median_steps(list(column)) for column in zip(*rounds, strict=True)])
        rows += [row for found in rounds for row in found]
        keep("warm-up", rows, device, target)
    print(f"\nkept in {target}")


if __name__ == "__main__":
    main()
