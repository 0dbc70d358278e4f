"""A training whose batches have a hundred sizes in random order: each step beside eager's of the same size, and peak memory.

    python -m benchmarks.bench_batch_sizes [--sizes 100] [--rounds 4] [--processes 3] [--no-gate] [--json FILE]

Eager and Kitsune have processes of their own, which take turns, with the same order of sizes; a step's time is its median over
them, since all steps of one eager process may take 1.2 times as long as those of another. The first `--warm` rounds are a
warm-up; of the steps after them none is to take over 1.2 times eager's, and memory is to stay below 1.25 times eager's at the
largest size.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.environment import RESULTS, keep

ROOT = Path(__file__).parent.parent
STEP = 16
WIDTH = 1024
SLOWER, MORE_MEMORY = 1.2, 1.25
# Eager again, since one eager run's steps differ from another's.
IN_TURN = ("eager", "kitsune", "again")
COLUMNS = (*IN_TURN, "largest")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of each step in this process, and its peak of memory in bytes."""
    import kitsune

    # As for users: with the gate, which leaves to eager what keeps changing.
    kitsune.config.gate = not options.no_gate
    torch.manual_seed(0)
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    blocks = [layer for _ in range(6) for layer in (nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.LayerNorm(WIDTH))]
    model = nn.Sequential(*blocks, nn.Linear(WIDTH, 10)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    x = torch.randn(STEP * options.sizes, WIDTH, device=device)
    target = torch.randint(0, 10, (len(x),), device=device)
    column, taken = options.column, []
    with kitsune.accelerate(device=device) if column == "kitsune" else contextlib.nullcontext():
        for size in order_of(options) if column != "largest" else [len(x)] * 8:
            torch.cuda.synchronize() if on_gpu else None
            start = time.perf_counter()
            loss = F.cross_entropy(model(x[:size]), target[:size])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            torch.cuda.synchronize() if on_gpu else None
            taken.append(round((time.perf_counter() - start) * 1e3, 4))
    decided = kitsune.counters()["gate_decided"] if column == "kitsune" else {}
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


def per_step(rows: list[dict[str, Any]]) -> list[float]:
    """Milliseconds of each step: the median over processes."""
    return [statistics.median(ms) for ms in zip(*(row["ms"] for row in rows), strict=True)]


def show(rows: list[dict[str, Any]], n_warm: int) -> None:
    """Ratios after the warm-up, those of a second eager run beside them for what is noise, and memory."""
    by_column = {column: [row for row in rows if row["column"] == column] for column in COLUMNS}
    taken = {column: per_step(of_it) for column, of_it in by_column.items()}
    for name in ("kitsune", "again"):
        ratios = sorted(a / b for a, b in zip(taken[name][n_warm:], taken["eager"][n_warm:], strict=True))
        n_slow = sum(ratio > SLOWER for ratio in ratios)
        print(f"{name}: step, times eager's of the same size: median {statistics.median(ratios):.2f}, slowest {ratios[-1]:.2f}")
        print(f"{name}: {n_slow} of {len(ratios)} steps took over {SLOWER} times as long")
    ours = by_column["kitsune"]
    for name in ours[0]["memory"]:
        peak = max(row["memory"][name] for row in ours)
        at = {"the largest": by_column["largest"][0], "the same sizes": by_column["eager"][0]}
        text = ", ".join(f"{peak / row['memory'][name]:.2f} times eager's at {what}" for what, row in at.items())
        print(f"peak memory {name}: {text} (bound {MORE_MEMORY})")
    for row in ours:
        for why, n in row["decided"].items():
            print(f"gate, {n} times: {why}")


def main() -> None:
    """Measure and print; with --column, one process's part of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--warm", type=int, default=1, help="rounds that are a warm-up (%(default)s)")
    parser.add_argument("--processes", type=int, default=3, help="of each kind (%(default)s)")
    parser.add_argument("--no-gate", action="store_true", help="record every step, whatever it costs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json")
    parser.add_argument("--column", choices=COLUMNS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.column:
        print(json.dumps(measure(options)))
        return
    rows = []
    for column in (*IN_TURN * options.processes, "largest"):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(in_new_process(column, options, folder))
    show(rows, options.warm * options.sizes)
    device = torch.device(options.device)
    target = options.json or str(RESULTS / f"batch-sizes-{device.type}.json")
    print(f"kept in {keep('batch-sizes', rows, device, target)}")


if __name__ == "__main__":
    main()
