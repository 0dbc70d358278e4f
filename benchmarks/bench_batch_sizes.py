"""A training whose batches have a hundred sizes in random order: each step beside eager's of the same size, and peak memory.

    python -m benchmarks.bench_batch_sizes [--sizes 100] [--rounds 4] [--processes 5] [--no-gate] [--json FILE]

Three equal trainings take turns in one process, step by step, each the first as often as the others: eager, Kitsune by its
decorator, and eager again, for what is noise. All steps of one eager process may take 1.2 times as long as those of another. A
step's time over eager's is its median over `--processes` such processes. The first `--warm` rounds are a warm-up; of the steps
after them none is to take over 1.2 times eager's, and memory, which is looked at in processes of their own, is to stay below 1.25
times eager's at the largest size.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.environment import RESULTS, keep

ROOT = Path(__file__).parent.parent
STEP = 16
WIDTH = 1024
SLOWER, MORE_MEMORY = 1.2, 1.25
IN_TURN = ("eager", "kitsune", "again")
COLUMNS = ("turns", "eager", "kitsune", "largest")


def training_of(x: Tensor, target: Tensor) -> Callable[[int], None]:
    """A step of a training of its own, on as many of the rows."""
    torch.manual_seed(0)
    blocks = [layer for _ in range(6) for layer in (nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.LayerNorm(WIDTH))]
    model = nn.Sequential(*blocks, nn.Linear(WIDTH, 10)).to(x.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step(size: int) -> None:
        loss = F.cross_entropy(model(x[:size]), target[:size])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of each step in this process by training, and its peak of memory in bytes."""
    import kitsune

    # As for users: with the gate, which leaves to eager what keeps changing.
    kitsune.config.gate = not options.no_gate
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    x = torch.randn(STEP * options.sizes, WIDTH, device=device)
    target = torch.randint(0, 10, (len(x),), device=device)
    column = options.column
    names = IN_TURN if column == "turns" else ("eager",) if column == "largest" else (column,)
    steps = {name: training_of(x, target) for name in names}
    if "kitsune" in steps:
        steps["kitsune"] = kitsune.accelerate(steps["kitsune"], device=device)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for k, size in enumerate(order_of(options) if column != "largest" else [len(x)] * 8):
        for name in (*names[k % len(names) :], *names[: k % len(names)]):
            wait()
            start = time.perf_counter()
            steps[name](size)
            wait()
            taken[name].append(round((time.perf_counter() - start) * 1e3, 4))
    decided = kitsune.counters()["gate_decided"] if "kitsune" in steps else {}
    memory = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()} if on_gpu else {}
    return {"column": column, "ms": taken, "memory": memory, "decided": {str(why): n for why, n in dict(decided).items()}}


def order_of(options: argparse.Namespace) -> list[int]:
    """The sizes, each once in a round."""
    sizes = [STEP * (k + 1) for k in range(options.sizes)]
    return [size for seed in range(options.rounds) for size in random.Random(seed).sample(sizes, len(sizes))]


def in_new_process(column: str, options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """The same in a process of its own, with empty caches."""
    command = [sys.executable, "-m", "benchmarks.bench_batch_sizes", "--column", column, "--device", options.device]
    command += ["--sizes", str(options.sizes), "--rounds", str(options.rounds), *(["--no-gate"] if options.no_gate else [])]
    caches = {name: str(Path(folder) / name) for name in ("KITSUNE_CACHE_DIR", "TRITON_CACHE_DIR")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **caches}, timeout=600)
    if done.returncode:
        sys.exit(f"{column}: exit {done.returncode}\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def ratios_of(name: str, rows: list[dict[str, Any]], n_warm: int) -> list[float]:
    """A training's steps over eager's behind the warm-up, each in its median over processes, sorted."""
    each = [[a / b for a, b in zip(row["ms"][name], row["ms"]["eager"], strict=True)][n_warm:] for row in rows]
    return sorted(statistics.median(ratios) for ratios in zip(*each, strict=True))


def show(rows: list[dict[str, Any]], n_warm: int) -> None:
    """Ratios after the warm-up, those of a second eager training beside them for what is noise, and memory."""
    by_column = {column: [row for row in rows if row["column"] == column] for column in COLUMNS}
    turns, ours = by_column["turns"], by_column["kitsune"]
    for name in IN_TURN[1:]:
        ratios = ratios_of(name, turns, n_warm)
        n_slow = sum(ratio > SLOWER for ratio in ratios)
        print(f"{name}: step, times eager's of the same size: median {statistics.median(ratios):.2f}, slowest {ratios[-1]:.2f}")
        print(f"{name}: {n_slow} of {len(ratios)} steps took over {SLOWER} times as long")
    for name in ours[0]["memory"]:
        peak = max(row["memory"][name] for row in ours)
        at = {"the largest": by_column["largest"][0], "the same sizes": by_column["eager"][0]}
        text = ", ".join(f"{peak / row['memory'][name]:.2f} times eager's at {what}" for what, row in at.items())
        print(f"peak memory {name}: {text} (bound {MORE_MEMORY})")
    for row in (*turns, *ours):
        for why, n in row["decided"].items():
            print(f"gate, {n} times: {why}")


def main() -> None:
    """Measure and print; with --column, one process's part of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--warm", type=int, default=1, help="rounds that are a warm-up (%(default)s)")
    parser.add_argument("--processes", type=int, default=5, help="in which they take turns (%(default)s)")
    parser.add_argument("--no-gate", action="store_true", help="record every step, whatever it costs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json")
    parser.add_argument("--column", choices=COLUMNS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.column:
        print(json.dumps(measure(options)))
        return
    rows = []
    for column in ("turns",) * options.processes + COLUMNS[1:]:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(in_new_process(column, options, folder))
    show(rows, options.warm * options.sizes)
    device = torch.device(options.device)
    target = options.json or str(RESULTS / f"batch-sizes-{device.type}.json")
    print(f"kept in {keep('batch-sizes', rows, device, target)}")


if __name__ == "__main__":
    main()
