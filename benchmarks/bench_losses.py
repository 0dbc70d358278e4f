"""How far a training's losses go from eager's: 200 steps of each model, loss by loss.

    python -m benchmarks.bench_losses [--models all] [--steps 200] [--columns eager,again,strict] [--json FILE]

Every column has a process of its own, the same weights, batches (16 take turns) and dropout. Columns:

    eager    with deterministic kernels
    again    the same without them: how far eager goes from itself
    strict   Kitsune as it is, in numerics="strict", with deterministic kernels; bitwise, fast: in these grades
    compile  torch.compile of model and loss

The distance of a column at a step is |loss - eager's| / |eager's|; `--bound` marks what is beyond it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import keep
from benchmarks.models import RECIPES, make, make_batches
from benchmarks.train_step.columns import forward_of, make_step

ROOT = Path(__file__).parent.parent
COLUMNS = ("eager", "again", "strict", "bitwise", "fast", "compile")
GRADES = ("strict", "bitwise", "fast")
N_BATCHES = 16


def losses(options: argparse.Namespace) -> list[float]:
    """The losses of one model in one column, in this process."""
    import kitsune

    device, column = torch.device(options.device), options.column
    torch.use_deterministic_algorithms(column in ("eager", *GRADES), warn_only=True)
    workload = make(options.models, device, options.precision, options.size)
    batches = make_batches(options.models, device, N_BATCHES, options.size)
    forward = forward_of(workload)
    if column == "compile":
        forward = torch.compile(forward)
    step = make_step(workload, forward, "every 20")
    kitsune.config.gate = False
    with kitsune.accelerate(device=device, numerics=column) if column in GRADES else contextlib.nullcontext():
        found = []
        for n in range(options.steps):
            found.append(step(*batches[n % N_BATCHES]))
            if n == 10 and column in GRADES:
                # The steps from here on are run by plan.
                kitsune.wait_for_kernels(120)
    if column in GRADES and not kitsune.counters()["kernels"]:
        sys.exit("No kernel of Kitsune's was run, so that there is nothing to compare.")
    return [float(loss) for loss in found]


def in_new_process(model: str, column: str, options: argparse.Namespace) -> list[float]:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.bench_losses", "--column", column, "--models", model]
    for name in ("steps", "device", "size", "precision"):
        command += [f"--{name}", str(getattr(options, name))]
    # What deterministic matrix products ask for.
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=options.timeout)
    if done.returncode:
        sys.exit(f"{model}, {column}: exit {done.returncode}\n{done.stderr[-3000:]}")
    found: list[float] = json.loads(done.stdout.splitlines()[-1])
    return found


def distances(ours: list[float], eager: list[float]) -> list[float]:
    """Relative, step by step."""
    return [abs(a - b) / abs(b) if b else abs(a) for a, b in zip(ours, eager, strict=True)]


def main() -> None:
    """Measure and print; with --column, one process's part of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="all")
    parser.add_argument("--columns", default="eager,again,strict")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--precision", default="amp", choices=("amp", "fp32"))
    parser.add_argument("--size", default="full", choices=("full", "small"))
    parser.add_argument("--bound", type=float, default=1e-3)
    parser.add_argument("--timeout", type=float, default=300)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json")
    parser.add_argument("--column", choices=COLUMNS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.column:
        print(json.dumps(losses(options)))
        return
    rows: list[dict[str, Any]] = []
    for model in RECIPES if options.models == "all" else options.models.split(","):
        eager = in_new_process(model, "eager", options)
        print(f"{model}: eager from {eager[0]:.4f} to {eager[-1]:.4f} in {len(eager)} steps", flush=True)
        rows.append({"model": model, "column": "eager", "precision": options.precision, "losses": eager})
        for column in options.columns.split(","):
            if column != "eager":
                ours = in_new_process(model, column, options)
                far = distances(ours, eager)
                n_beyond = sum(d > options.bound for d in far)
                print(
                    f"{model}: {column} at most {max(far):.2e} from eager, beyond {options.bound:g} at {n_beyond} steps",
                    flush=True,
                )
                rows.append({"model": model, "column": column, "precision": options.precision, "losses": ours, "far": max(far)})
    print(f"kept in {keep('losses', rows, torch.device(options.device), options.json)}")


if __name__ == "__main__":
    main()
