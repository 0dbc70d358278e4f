"""What each of Kitsune's switches is worth: a static step as it is beside one with that switch turned off.

    python -m benchmarks.bench_switches [--models mlp,bert] [--switches early_starts,streams] [--visits 3] [--json FILE]

Each setting has processes of its own, in which everything is compiled and captured before it is timed. They take turns: first
each setting once, then all once more. There is one process at a time: of two that shared an H200, though the other one rested,
the first took 18 % longer for a step of BERT, whichever its setting was. A process's figure is the median of its rounds, and a
ratio that of the medians: above 1 the switch pays.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import kitsune
from benchmarks.environment import keep
from benchmarks.models import MODELS, make, make_batches
from benchmarks.timing import millis
from benchmarks.train_step.columns import forward_of, make_step

ROOT = Path(__file__).parent.parent
# What turns each of them off.
OFF = {"early_starts": "0", "streams": "1", "pages": "0", "layouts": "0", "fuse": "0"}
N_BATCHES, WAIT_S = 4, 120.0
# Steps until a region is replayed by its plan, before its kernels are there and after.
PREPARED = 16
# Milliseconds of a turn.
TURN_MS = 100.0


def serve(model: str, device: torch.device, size: Any) -> None:
    """A process's life: how many steps, a line in; milliseconds of each, a line out."""
    workload, batches = make(model, device, "amp", size), itertools.cycle(make_batches(model, device, N_BATCHES, size))
    step = kitsune.accelerate(make_step(workload, forward_of(workload), "every 20"), static=True, device=device)
    for _ in range(2):
        for _ in range(PREPARED):
            step(*next(batches))
        kitsune.wait_for_kernels(WAIT_S)
    for line in sys.stdin:
        step(*next(batches))
        before = kitsune.counters()["replayed"]
        taken = millis(lambda: step(*next(batches)), int(line), device)
        replayed = kitsune.counters()["replayed"] - before
        print(json.dumps({"ms": taken, "replayed": replayed >= int(line)}), flush=True)


class Turn:
    """A process with one setting."""

    def __init__(self, model: str, options: argparse.Namespace, switch: str | None) -> None:
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.bench_switches", "--child", "--models", model]
        command += ["--device", options.device, "--size", options.size]
        off = {} if switch is None else {f"KITSUNE_{switch.upper()}": OFF[switch]}
        environment = {**os.environ, "KITSUNE_TUNING": "off", "KITSUNE_AUDIT": "0", **off}
        pipe = subprocess.PIPE
        self.name = switch or "on"
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT, env=environment)

    def millis(self, steps: int) -> float:
        """Milliseconds of a step, of so many. Raises RuntimeError if they were not replayed."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"The process with {self.name} has ended with {self._process.wait()}.")
        answer = json.loads(line)
        if not answer["replayed"] and torch.cuda.is_available():
            raise RuntimeError(f"The steps with {self.name} were not replayed.")
        return float(answer["ms"])

    def close(self) -> None:
        """End it."""
        self._process.communicate()


def visit(model: str, options: argparse.Namespace, switch: str | None) -> float:
    """Milliseconds of a step with one setting, in one process."""
    turn = Turn(model, options, switch)
    try:
        steps = max(3, int(TURN_MS / turn.millis(5)))
        return statistics.median(turn.millis(steps) for _ in range(options.rounds))
    finally:
        turn.close()


def compare(model: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each switch."""
    taken: dict[str | None, list[float]] = {switch: [] for switch in (None, *options.switches)}
    for _ in range(options.visits):
        for switch, millis_ in taken.items():
            millis_.append(visit(model, options, switch))
    on, rows = statistics.median(taken[None]), []
    for switch in options.switches:
        off = statistics.median(taken[switch])
        row = {"model": model, "switch": switch, "on_ms": round(on, 4), "off_ms": round(off, 4), "ratio": round(off / on, 4)}
        visits = {"on_visits_ms": [round(ms, 4) for ms in taken[None]], "off_visits_ms": [round(ms, 4) for ms in taken[switch]]}
        rows.append({**row, **visits})
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=lambda text: text.split(","), default=list(MODELS))
    parser.add_argument("--switches", type=lambda text: text.split(","), default=list(OFF), help="some of " + ",".join(OFF))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=("full", "small"))
    parser.add_argument("--visits", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--json")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := sorted({*options.switches} - {*OFF}):
        parser.error(f"no such switch: {', '.join(unknown)}; there are {', '.join(OFF)}")
    device = torch.device(options.device)
    options.size = options.size or ("full" if device.type == "cuda" else "small")
    if options.child:
        return serve(options.models[0], device, options.size)
    rows: list[dict[str, Any]] = []
    for model in options.models:
        made = compare(model, options)
        for row in made:
            print(
                f"{row['model']:10s}{row['switch']:14s}on {row['on_ms']:8.3f} ms  off {row['off_ms']:8.3f} ms  "
                f"off / on {row['ratio']:.3f} (on {row['on_visits_ms']}, off {row['off_visits_ms']})",
                flush=True,
            )
        rows += made
        # A model at a time, so that each is kept if a later one fails.
        kept = keep("switches", rows, device, options.json)
    print(f"kept in {kept}")


if __name__ == "__main__":
    main()
