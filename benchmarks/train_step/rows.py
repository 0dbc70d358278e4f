"""Rows: how one is made by processes of its own, and how those of several runs become one file per device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import environment
from benchmarks.models import MODELS
from benchmarks.train_step.columns import COLUMNS
from benchmarks.train_step.worker import Task

Row = dict[str, Any]
KEY = ("size", "precision", "read", "model", "column")
# Each of them has kernels of its own on disk.
CACHES = ("KITSUNE_CACHE_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
ROOT = Path(__file__).parent.parent.parent


def measure(task: Task, timeout: float, with_warm: bool) -> Row:
    """The row of one model and column. Whatever goes wrong in its processes is the row's `note`."""
    row: Row = {name: getattr(task, name) for name in KEY}
    with tempfile.TemporaryDirectory() as folder:
        caches = {variable: str(Path(folder) / variable) for variable in CACHES}
        for visit in ("cold", "warm") if with_warm else ("cold",):
            start = time.perf_counter()
            found = _in_new_process(replace(task, visit=visit), caches, Path(folder) / "row.json", timeout)
            found[f"{visit}_process_s"] = round(time.perf_counter() - start, 1)
            row |= found
            if "note" in row:
                row["note"] = f"{row['note']} ({visit} caches)" if visit == "warm" else row["note"]
                break
    return row


def _in_new_process(task: Task, caches: dict[str, str], target: Path, timeout: float) -> Row:
    target.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.train_step.worker", task.to_json(), str(target)]
    note = None
    try:
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, **caches}, timeout=timeout)
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or ["without a word"]
            note = f"failed: exit {done.returncode}: {last[0][:300]}"
    except subprocess.TimeoutExpired:
        note = f"failed: not done after {timeout:g} s"
    row: Row = json.loads(target.read_text()) if target.exists() else {}
    return row | ({"note": note} if note else {})


def merge(old: list[Row], new: list[Row]) -> list[Row]:
    """All rows, in order of models and columns; a new one takes the place of an old one with the same key."""
    rows = {_key(row): row for row in [*old, *new]}
    return compare_losses(sorted(rows.values(), key=_position))


def compare_losses(rows: list[Row]) -> list[Row]:
    """Adds how far the losses of each column are from eager's, in the first step and at most; to eager, how far its second
    process is from its first."""
    for row in rows:
        eager = find(rows, row, "eager")
        if eager is None or "cold" not in eager or "cold" not in row:
            continue
        visits = [row[name]["losses"] for name in ("cold", "warm") if name in row]
        if row is eager:
            visits = visits[1:]
        apart = [[abs(a - b) for a, b in zip(losses, eager["cold"]["losses"], strict=False)] for losses in visits]
        if apart:
            row["losses_apart"] = _largest(distance for distances in apart for distance in distances)
            row["first_loss_apart"] = _largest(distances[0] for distances in apart)
    return rows


def _largest(distances: Iterable[float]) -> float:
    """One that is no number, from a loss that is none, is larger than any."""
    return max(distances, key=lambda distance: (distance != distance, distance))


def find(rows: list[Row], like: Row, column: str) -> Row | None:
    """The row of another column of the same model, size, precision and reading."""
    wanted = (*_key(like)[:-1], column)
    return next((row for row in rows if _key(row) == wanted), None)


def load(path: Path) -> dict[str, Any]:
    """A file of results: its environment and rows."""
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def load_for_merging(path: Path, device: torch.device) -> list[Row]:
    """The rows that new ones may join: none if there is no file. Raises ValueError for those of another device or torch."""
    if not path.exists():
        return []
    found, here = load(path), environment(device)
    for name in ("device", "torch"):
        if found["environment"][name] != here[name]:
            there = found["environment"][name]
            raise ValueError(f"{path} was measured with {name} {there!r}, and this is {here[name]!r}: name another file.")
    rows: list[Row] = found["rows"]
    return rows


def keep(path: Path, rows: list[Row], device: torch.device) -> None:
    """Write a row per line, which keeps thirty losses from taking thirty lines. Each row has its own commit."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{"environment": {json.dumps(environment(device))},\n"rows": [\n{lines}\n]}}\n')


def _key(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in KEY)


def _position(row: Row) -> tuple[Any, ...]:
    return *(row[name] for name in KEY[:3]), MODELS.index(row["model"]), list(COLUMNS).index(row["column"])
