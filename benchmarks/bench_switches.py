"""What each of Kitsune's switches is worth: a static step as it is beside one with that switch turned off, in the same process.

    python -m benchmarks.bench_switches [--models mlp,bert] [--switches early_starts,streams] [--rounds 12] [--json FILE]

Each has a model and a region of its own. They take turns, some steps each, so that a clock that falls counts for both; the ratio
is the median over the rounds of what the switch takes off a step: above 1 it pays.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import kitsune
from benchmarks.environment import keep
from benchmarks.models import MODELS, make, make_batches
from benchmarks.timing import millis
from benchmarks.train_step.columns import forward_of, make_step

# What turns each of them off.
OFF: dict[str, Any] = {"early_starts": False, "streams": 1, "pages": False, "layouts": False, "fuse": False}
N_BATCHES, PREPARED, WAIT_S = 4, 8, 120.0
# Milliseconds of a turn, and steps before it: a knob that changes has a static step learned anew.
TURN_MS, LEARNED = 100.0, 8


class Turn:
    """A model that trains with one setting."""

    def __init__(self, model: str, device: torch.device, size: str, options: dict[str, Any]) -> None:
        self._options, self._device, self._n = options, device, 0
        workload = make(model, device, "amp", size)  # type: ignore[arg-type]
        self._batches = make_batches(model, device, N_BATCHES, size)  # type: ignore[arg-type]
        step = make_step(workload, forward_of(workload), "every 20")
        self._step: Callable[..., Tensor] = kitsune.accelerate(step, static=True, device=device)
        with kitsune.config.patch(tuning="off", **options):
            for _ in range(PREPARED):
                self._next()
            kitsune.wait_for_kernels(WAIT_S)
            for _ in range(PREPARED):
                self._next()

    def millis(self, steps: int) -> float:
        """Milliseconds of a step."""
        with kitsune.config.patch(tuning="off", audit=0, **self._options):
            for _ in range(LEARNED):
                self._next()
            before = kitsune.counters()["static_skipped"]
            taken = millis(self._next, steps, self._device)
            skipped = kitsune.counters()["static_skipped"] - before
        if self._device.type == "cuda" and skipped != steps:
            raise RuntimeError(f"Of {steps} steps with {self._options or 'all on'} {skipped} were replayed without Python.")
        return taken

    def _next(self) -> Tensor:
        self._n += 1
        return self._step(*self._batches[self._n % N_BATCHES])


def compare(model: str, switches: list[str], rounds: int, device: torch.device, size: str) -> list[dict[str, Any]]:
    """A row for each switch."""
    settings = {"on": {}, **{name: {name: OFF[name]} for name in switches}}
    turns = {name: Turn(model, device, size, options) for name, options in settings.items()}
    steps = {name: max(3, int(TURN_MS / turn.millis(5))) for name, turn in turns.items()}
    taken: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(rounds):
        for name, turn in turns.items():
            taken[name].append(turn.millis(steps[name]))
    rows = []
    for name in switches:
        low, middle, high = statistics.quantiles([off / on for off, on in zip(taken[name], taken["on"], strict=True)], n=4)
        on, off = statistics.median(taken["on"]), statistics.median(taken[name])
        row = {"model": model, "switch": name, "on_ms": round(on, 4), "off_ms": round(off, 4), "ratio": round(middle, 4)}
        rows.append({**row, "quartiles": [round(low, 4), round(high, 4)]})
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=lambda text: text.split(","), default=list(MODELS))
    parser.add_argument("--switches", type=lambda text: text.split(","), default=list(OFF), help="some of " + ",".join(OFF))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=("full", "small"))
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--json")
    options = parser.parse_args()
    if unknown := sorted({*options.switches} - {*OFF}):
        parser.error(f"no such switch: {', '.join(unknown)}; there are {', '.join(OFF)}")
    device = torch.device(options.device)
    size = options.size or ("full" if device.type == "cuda" else "small")
    rows: list[dict[str, Any]] = []
    for model in options.models:
        kitsune.reset()
        made = compare(model, options.switches, options.rounds, device, size)
        for row in made:
            print(
                f"{row['model']:10s}{row['switch']:14s}on {row['on_ms']:8.3f} ms  off {row['off_ms']:8.3f} ms  "
                f"off / on {row['ratio']:.3f} ({row['quartiles'][0]:.3f} to {row['quartiles'][1]:.3f})",
                flush=True,
            )
        rows += made
        # A model at a time, so that each is kept if a later one fails.
        kept = keep("switches", rows, device, options.json)
    print(f"kept in {kept}")


if __name__ == "__main__":
    main()
