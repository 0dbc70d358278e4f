"""How far a training's losses go from eager's: 200 steps of each model, loss by loss, in each grade of numerics.

    python -m benchmarks.bench_convergence [--models small] [--precision fp32,amp,fp16] [--columns all] [--jobs 12] [--json FILE]

`--models small` are eight small models on real data (benchmarks/small_models.py, benchmarks/small_data.py), `large` the seven of
benchmarks/models.py on random data; or names. Every model has, in each precision, a process of its own for all of its columns,
`--jobs` of them at a time; they begin with the same weights and have the same batches and dropout:

    eager    with deterministic kernels
    again    the same without them: how far eager goes from itself
    nudged   eager, with every parameter moved by one unit in the last place before the first step: how far a training goes whose
             sums are rounded otherwise just once
    seeds    eager from four other seeds: how far apart trainings are that differ in nothing else
    bitwise, strict, fast  Kitsune in these grades of numerics, with deterministic kernels
    fast-seeds  "fast" from the five seeds: a single training is farther from eager's than those are from each other in one of
             seven cases even where nothing differs but the seed
    compile  torch.compile of model and loss

The distance of a column at a step is |loss - eager's| / |eager's|. What is asked: "bitwise" has eager's bits, of each loss and of
every parameter at the end; "strict" is within `--bound` of eager's loss at each step; "fast" is no further from eager's loss on
held-out data (of random data: of the last turn of all batches) than the farthest two of five seeds are from each other. Exits
with 1 where that is not so. Where "nudged" leaves the bound, a training multiplies every rounding, and nobody's sums can keep it.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import keep
from benchmarks.loss_curves import AUTOCAST, GRADES, Curve, curve, determinism
from benchmarks.models import RECIPES
from benchmarks.small_models import SMALL

ROOT = Path(__file__).parent.parent
COLUMNS = ("again", "nudged", "seeds", *GRADES, "fast-seeds", "compile")
ALL = COLUMNS[:-2]
SEEDS = (0, 1, 2, 3, 4)
Row = dict[str, Any]


def distances(ours: list[float], eager: list[float]) -> list[float]:
    """Relative, step by step; where one is NaN and the other not, infinite."""
    found = []
    for a, b in zip(ours, eager, strict=True):
        same = a == b or (a != a and b != b)
        found.append(0.0 if same else float("inf") if a != a or b != b else abs(a - b) / abs(b) if b else abs(a))
    return found


def row_of(column: str, ours: Curve, eager: Curve, spread: float | None, bound: float) -> Row:
    """What is kept of a column: how far it goes, where, and whether that is as near as its grade promises."""
    far = distances(ours.losses, eager.losses)
    apart = abs(ours.evaluated - eager.evaluated)
    row: Row = {
        "column": column,
        "steps": len(far),
        "first": ours.losses[0],
        "last": ours.losses[-1],
        "held_out": ours.evaluated,
        "largest_distance": max(far),
        "mean_distance": sum(far) / len(far),
        "at_step": far.index(max(far)),
        "first_other_step": next((i for i, d in enumerate(far) if d), None),
        "beyond_bound": sum(d > bound for d in far),
        "same_parameters": ours.digest == eager.digest,
        "kernels": ours.kernels,
    }
    if column == "bitwise":
        row["kept"] = not max(far) and row["same_parameters"]
    elif column == "strict":
        row["kept"] = not row["beyond_bound"]
    elif column == "fast" and spread is not None:
        row |= {"spread_of_seeds": spread, "kept": apart <= spread}
    return row


def rows_of(model: str, precision: str, options: argparse.Namespace) -> list[Row]:
    """All columns of one model in one precision, in this process."""
    device, wanted = torch.device(options.device), options.columns
    how = determinism(model, device, precision, options.size)

    def run(column: str, seed: int = 0) -> Curve:
        # A model, its graph and its optimizer refer to each other.
        gc.collect()
        return curve(model, column, device, precision, options.steps, seed, options.size, how)

    start = time.perf_counter()
    eager = run("eager")
    seeds = [eager.evaluated, *(run("eager", seed).evaluated for seed in SEEDS[1:])] if "seeds" in wanted else []
    spread = max(seeds) - min(seeds) if seeds else None
    first = row_of("eager", eager, eager, spread, options.bound)
    rows = [{**first, "deterministic": how, "losses": eager.losses[:: max(1, options.steps // 10)]}]
    if seeds:
        rows.append({"column": "seeds", "held_out": seeds, "spread_of_seeds": spread})
    rows += [row_of(column, run(column), eager, spread, options.bound) for column in wanted if "seeds" not in column]
    if "fast-seeds" in wanted:
        rows.append({"column": "fast-seeds", "held_out": [run("fast", seed).evaluated for seed in SEEDS]})
    name = {"model": model, "precision": precision}
    return [{**name, **row} for row in rows] + [{**name, "column": "seconds", "seconds": time.perf_counter() - start}]


def in_new_process(model: str, precision: str, options: argparse.Namespace) -> list[Row]:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.bench_convergence", "--work", f"{model},{precision}"]
    for name in ("columns", "steps", "device", "size", "bound"):
        value = getattr(options, name)
        command += [f"--{name}", ",".join(value) if name == "columns" else str(value)]
    # The first is what deterministic matrix products ask for.
    environment = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "OMP_NUM_THREADS": "2", "KITSUNE_COMPILE_WORKERS": "2", **os.environ}
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=options.timeout)
    except subprocess.TimeoutExpired:
        return [{"model": model, "precision": precision, "column": "failed", "why": f"not done in {options.timeout:g} s"}]
    if done.returncode:
        why = done.stderr.strip()[-1500:]
        return [{"model": model, "precision": precision, "column": "failed", "why": f"exit {done.returncode}: {why}"}]
    found: list[Row] = json.loads(done.stdout.splitlines()[-1])
    return found


def told(row: Row) -> str:
    """A row as a line."""
    head = f"{row['model']:12s}{row['precision']:6s}{row['column']:11s}"
    if row["column"] == "failed":
        return f"{head}{row['why']}"
    if "seeds" in row["column"]:
        return f"{head}held out {min(row['held_out']):.4f} to {max(row['held_out']):.4f}"
    if row["column"] == "seconds":
        return f"{head}{row['seconds']:.0f}"
    line = f"{head}{row['first']:.4f} -> {row['last']:.4f}, held out {row['held_out']:.4f}"
    if row["column"] == "eager":
        return f"{line}, deterministic {row['deterministic']}"
    far = (
        f"{row['mean_distance']:.1e} from eager, at most {row['largest_distance']:.1e} at step {row['at_step']}"
        if row["largest_distance"]
        else "eager's bits"
    )
    others = (
        "" if row["same_parameters"] else f", first other at {row['first_other_step']}, {row['beyond_bound']} beyond the bound"
    )
    return f"{line}; {far}{others}; {row['kernels']} kernels{'' if row.get('kept', True) else '  NOT KEPT'}"


def main() -> None:
    """Measure and print; with --work, one process's part of it."""
    options = parse()
    if options.work:
        print(json.dumps(rows_of(*options.work.split(","), options)))
        return
    names = {"small": list(SMALL), "large": list(RECIPES)}.get(options.models) or options.models.split(",")
    pairs = [(model, precision) for precision in options.precision.split(",") for model in names]
    rows: list[Row] = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for found in pool.map(lambda pair: in_new_process(*pair, options), pairs):
            print("\n".join(told(row) for row in found), flush=True)
            rows += found
    print(f"kept in {keep('convergence', rows, torch.device(options.device), options.json)}")
    for grade in GRADES:
        judged = [row["kept"] for row in rows if row["column"] == grade and "kept" in row]
        if judged:
            print(f"{grade}: {sum(judged)} of {len(judged)} as promised")
    failed = [row for row in rows if row["column"] == "failed" or not row.get("kept", True)]
    sys.exit(bool(failed))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="small", help="small, large or names")
    parser.add_argument("--precision", default=",".join(AUTOCAST))
    parser.add_argument("--columns", default="all", help=f"of {', '.join(COLUMNS)}; eager is always there")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--size", default="full", choices=("full", "small"))
    parser.add_argument("--bound", type=float, default=1e-3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=600)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.columns = list(ALL) if options.columns == "all" else options.columns.split(",")
    if unknown := [column for column in options.columns if column not in COLUMNS]:
        parser.error(f"there is no column {unknown[0]!r}; choose of {', '.join(COLUMNS)}")
    return options


if __name__ == "__main__":
    main()
