"""What the rows say, as text: times side by side, then first steps, memory, starts and losses."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from benchmarks.train_step.rows import Row, find

# What a column is compared with: `2.00` says that a step takes half of that one's time.
PEERS = ("eager", "graph", "compile-graph")
N_FIRST = 8
# A warm-up step may take so much longer than eager's of its number, and one of them, which captures, so much more.
FIRST_FACTOR, CAPTURE_MS = 1.5, 50.0
GIB = 2**30


def show(rows: list[Row]) -> str:
    """Everything, in blocks of one size, precision and reading."""
    blocks = []
    for (size, precision, read), group in itertools.groupby(rows, key=lambda row: (row["size"], row["precision"], row["read"])):
        members = list(group)
        title = f"{precision}, {size} size, loss read {read if read != 'each' else 'in each step, before backward'}"
        blocks.append(
            "\n".join([f"== {title}", *times(members), "", *starts(members), "", *first_steps(members), *notes(members)])
        )
    return "\n\n".join(blocks)


def times(rows: list[Row]) -> list[str]:
    """Step, host and device time, launches, and speed compared with the peers."""
    head = f"{'model':10s}{'column':16s}{'step ms':>10s}{'(quartiles)':>20s}{'host ms':>9s}{'device ms':>11s}{'launches':>10s}"
    lines = [head + "".join(f"{'x ' + peer:>16s}" for peer in PEERS)]
    for row in _with(rows, "step_ms"):
        low, high = row["quartiles_ms"]
        line = f"{row['model']:10s}{row['column']:16s}{row['step_ms']:10.3f}{f'({low:.3f} to {high:.3f})':>20s}"
        line += f"{_number(row.get('host_ms'), 9, 3)}{_number(row.get('device_ms'), 11, 3)}{_number(row.get('launches'), 10, 1)}"
        lines.append(line + "".join(_number(speed(rows, row, peer), 16, 2) for peer in PEERS))
    return lines


def speed(rows: list[Row], row: Row, peer: str) -> float | None:
    """How many times as fast as a peer."""
    other = find(rows, row, peer)
    if other is None or "step_ms" not in other or "step_ms" not in row:
        return None
    ratio: float = other["step_ms"] / row["step_ms"]
    return ratio


def starts(rows: list[Row]) -> list[str]:
    """Seconds to the first and to the first steady step by state of the caches; peak memory; distance of the losses."""
    head = f"{'model':10s}{'column':16s}{'first s, empty':>15s}{'steady s':>9s}{'first s, warm':>15s}{'steady s':>9s}"
    head += f"{'peak GiB: all':>14s}{'reserved':>9s}{'steady':>8s}{'reserved':>9s}{'loss off, 1st':>15s}{'at most':>10s}"
    lines = [head]
    for row in _with(rows, "cold"):
        line = f"{row['model']:10s}{row['column']:16s}"
        for visit in ("cold", "warm"):
            seen = row.get(visit, {})
            line += _number(seen.get("first_step_s"), 15, 2) + _number(seen.get("steady_s"), 9, 2)
        for when, width in (("overall", 14), ("steady", 8)):
            seen = row.get("memory", {}).get(when, {})
            line += _gib(seen.get("allocated"), width) + _gib(seen.get("reserved"), 9)
        lines.append(line + _distance(row.get("first_loss_apart"), 15) + _distance(row.get("losses_apart"), 10))
    lines.append(
        "(loss off: from eager's, in the first step and at most; for eager itself, of its second process from its first."
        " Where there is dropout, compilers draw other random numbers.)"
    )
    return lines


def first_steps(rows: list[Row]) -> list[str]:
    """Milliseconds of the first steps with empty caches, and those that break the promise."""
    lines = [f"{'model':10s}{'column':16s}first {N_FIRST} steps, ms; over {FIRST_FACTOR} x eager's + {CAPTURE_MS:g} ms once"]
    for row in _with(rows, "cold"):
        line = f"{row['model']:10s}{row['column']:16s}" + "".join(f"{ms:10.1f}" for ms in row["cold"]["first_ms"][:N_FIRST])
        eager = find(rows, row, "eager")
        if row is not eager and eager is not None and "cold" in eager:
            over = slow_first_steps(row["cold"]["first_ms"], eager["cold"]["first_ms"])
            line += f"   over: steps {', '.join(str(n) for n in over)}" if over else "   none over"
        lines.append(line)
    return lines


def slow_first_steps(taken: list[float], eager: list[float]) -> list[int]:
    """Numbers, from 1, of the first steps that took longer than allowed. Of those that need the allowance for capture, the
    first gets it."""
    over, captured = [], False
    for n, (ms, of_eager) in enumerate(zip(taken[:N_FIRST], eager[:N_FIRST], strict=False), 1):
        beyond = ms - FIRST_FACTOR * of_eager
        if beyond <= 0:
            continue
        if beyond <= CAPTURE_MS and not captured:
            captured = True
            continue
        over.append(n)
    return over


def notes(rows: list[Row]) -> list[str]:
    """Why a column is missing or incomplete."""
    told = [f"{row['model']}, {row['column']}: {row['note']}" for row in rows if "note" in row]
    return ["", *told] if told else []


def _with(rows: list[Row], name: str) -> Iterator[Row]:
    return (row for row in rows if name in row)


def _number(value: Any, width: int, digits: int) -> str:
    return f"{'-':>{width}s}" if value is None else f"{value:{width}.{digits}f}"


def _gib(nbytes: int | None, width: int) -> str:
    return _number(None if nbytes is None else nbytes / GIB, width, 2)


def _distance(value: float | None, width: int) -> str:
    return f"{'-':>{width}s}" if value is None else f"{value:{width}.3g}"
