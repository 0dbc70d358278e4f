"""The time of every step, by what was done with it: the clock of the host or, on CUDA, marks in the device's stream."""

from __future__ import annotations

import time
from collections import deque
from itertools import pairwise
from statistics import fmean, median, pstdev
from typing import Any

import torch

from kitsune.profiler.tally import Tally

# Steps that are remembered.
MAX_STEPS = 4096
# What became of a step, the best last: what is asked of a summary is the speed of those against the first of `BASELINES`.
KINDS = ("eager", "observed", "recorded", "replayed")
BASELINES = ("eager", "observed")


class StepMeter:
    """Takes the time between the ends of steps. On CUDA nothing waits for the device until the times are asked for."""

    def __init__(self, tally: Tally, device: torch.device) -> None:
        self._tally, self._device = tally, device
        # (kind, mark at the end of the step)
        self._marks: deque[tuple[str, Any]] = deque(maxlen=MAX_STEPS)
        self._before = _counts(tally)

    def step_ended(self) -> None:
        """An optimizer's step has ended."""
        now, before = _counts(self._tally), self._before
        self._before = now
        # With one new operator in it a step costs what an observed one does.
        kind = next((k for k in ("observed", "replayed", "recorded") if now[k] > before[k]), "eager")
        self._marks.append((kind, self._mark()))

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> dict[str, list[float]]:
        """The times of the steps, by kind, the oldest first. The first step has none: nothing says when it began."""
        found: dict[str, list[float]] = {}
        marks = list(self._marks)
        if marks and self._device.type == "cuda":
            marks[-1][1].synchronize()
        for (_, start), (kind, end) in pairwise(marks):
            elapsed = start.elapsed_time(end) / 1e3 if self._device.type == "cuda" else end - start
            found.setdefault(kind, []).append(elapsed)
        return found


def _counts(tally: Tally) -> dict[str, int]:
    return {"observed": tally.observed, "recorded": tally.recorded, "replayed": tally.n_replayed}


def statistics_of(seconds: list[float]) -> dict[str, float]:
    """Mean, deviation, least, median and most, in milliseconds."""
    ms = [1e3 * one for one in seconds]
    return {"mean": fmean(ms), "std": pstdev(ms), "min": min(ms), "median": median(ms), "max": max(ms), "n": len(ms)}


def speed(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Step time now against the baseline that was measured in the same run: eager steps or, without those, observed ones."""
    now = next((kind for kind in reversed(KINDS) if kind not in BASELINES and seconds.get(kind)), None)
    base = next((kind for kind in BASELINES if seconds.get(kind)), None)
    if now is None and base == "eager":
        now = base
    ours, theirs = (None if kind is None else median(seconds[kind]) for kind in (now, base))
    return {
        "kind": now,
        "step_ms": None if ours is None else 1e3 * ours,
        "baseline": base,
        "baseline_ms": None if theirs is None else 1e3 * theirs,
        "speedup": theirs / ours if ours and theirs and now != base else None,
    }
