"""A step of models of many kinds: eager, under Kitsune in an unmodified loop with its gate on, and compiled.

    python -m benchmarks.bench_zoo [--models NAME,...] [--columns eager,kitsune] [--rounds 5] [--json FILE]

Bf16 autocast and fused AdamW, on three batches in turn. Each column has a model of its own, and is brought to where it stays
(Kitsune: its kernels are there, tiles have been tried, and its gate has decided; `torch.compile`: of model and loss, at its
defaults) before it is measured; eager is measured before and behind the others. A model whose library is not installed is left
out, and said.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import statistics
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import kitsune
from benchmarks.environment import keep
from benchmarks.timing import millis
from benchmarks.zoo import N_BATCHES, ZOO, Made

COLUMNS = ("eager", "kitsune", "compile")
# Steps until kernels are asked for, and after they have come until the gate has decided; seconds to wait for them.
FIRST, SETTLED, WAIT_S = 24, 100, 60.0
# Milliseconds of a block of steps, and the fewest and the most in one.
BLOCK_MS, FEWEST, MOST = 250.0, 5, 50
COUNTED = ("backwards_followed", "replayed", "realized", "observed")


def make_step(made: Made, device: torch.device, compiled: bool = False) -> Callable[[], Tensor]:
    """One step of a training of its own."""
    model, batches, loss_of = made
    loss_of = torch.compile(loss_of) if compiled else loss_of
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    n = 0

    def step() -> Tensor:
        nonlocal n
        n += 1
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_of(model, *batches[n % N_BATCHES])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def settle(column: str, step: Callable[[], Tensor]) -> None:
    """Bring a column to where it stays."""
    for _ in range(FIRST):
        step()
    if column == "kitsune":
        kitsune.wait_for_kernels(WAIT_S)
        for _ in range(SETTLED):
            step()
        # Or the region is captured with better tiles in the middle of what is measured.
        kitsune.wait_for_kernels(WAIT_S, tuned=True)
        for _ in range(FIRST):
            step()


def measure(name: str, device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """A row: milliseconds of a step by column, and of Kitsune's what became of it."""
    kitsune.reset()
    steps, taken, counts = {}, {column: list[float]() for column in options.columns}, dict[str, float]()
    for column in options.columns:
        torch.manual_seed(0)
        steps[column] = make_step(ZOO[name](device), device, column == "compile")
    # Eager once more at the end: what else the host does is not to be one column's.
    for turn, column in enumerate([*options.columns, "eager"]):
        step = steps[column]
        with kitsune.accelerate(device=device) if column == "kitsune" else contextlib.nullcontext():
            if turn < len(steps):
                settle(column, step)
            n = max(FEWEST, min(MOST, int(BLOCK_MS / millis(step, FEWEST, device))))
            before = kitsune.counters()
            taken[column] += [millis(step, n, device) for _ in range(options.rounds)]
            if column == "kitsune":
                after = kitsune.counters()
                counts = {counter: round((after[counter] - before[counter]) / (n * options.rounds), 2) for counter in COUNTED}
    eager = statistics.median(taken["eager"])
    row: dict[str, Any] = {"model": name, "eager_ms": round(eager, 3)}
    for column in options.columns:
        if column != "eager":
            low, middle, high = statistics.quantiles(taken[column], n=4, method="inclusive")
            row |= {f"{column}_ms": round(middle, 3), f"{column}_of_eager": round(middle / eager, 3)}
            row |= {f"{column}_quartiles_ms": [round(low, 3), round(high, 3)]}
    if counts:
        after = kitsune.counters()
        row |= counts | {"gate": list(after["gate_decided"]), "graph_refused": list(after["graph_refused"])}
    return row


def told(row: dict[str, Any]) -> str:
    """A row in words."""
    text = f"{row['model']:18s} eager {row['eager_ms']} ms"
    for column in COLUMNS[1:]:
        if f"{column}_ms" in row:
            text += f", {column} {row[f'{column}_ms']} ms, {row[f'{column}_of_eager']} of it ({row[f'{column}_quartiles_ms']})"
    if "gate" not in row:
        return text
    return "; ".join([text, ", ".join(f"{counter} {row[counter]}" for counter in COUNTED), *row["gate"], *row["graph_refused"]])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", type=lambda names: names.split(","), default=list(ZOO))
    parser.add_argument("--columns", type=lambda names: names.split(","), default=["eager", "kitsune"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json")
    options = parser.parse_args()
    if unknown := [*({*options.models} - {*ZOO}), *({*options.columns} - {*COLUMNS})]:
        parser.error(f"{', '.join(unknown)}: models are {', '.join(ZOO)}, and columns {', '.join(COLUMNS)}")
    if "eager" not in options.columns:
        parser.error("columns are compared with eager: it has to be one of them")
    device, rows = torch.device(options.device), list[dict[str, Any]]()
    for name in options.models:
        try:
            with kitsune.config.patch(gate=True):
                rows.append(row := measure(name, device, options))
            print(told(row), flush=True)
            # After each: a run of all takes minutes.
            kept = keep("zoo", rows, device, options.json)
        except ModuleNotFoundError as error:
            print(f"{name:18s} left out: {error}", flush=True)
        except Exception:
            print(f"{name:18s} failed: {traceback.format_exc()}", flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if rows:
        print(f"kept in {kept}")


if __name__ == "__main__":
    main()
