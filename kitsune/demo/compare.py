"""Two trainings side by side: are they the same bit for bit, and what did each cost?"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kitsune.demo.train import TrainResult

# How far a loss may be from eager's where sums have an order of their own.
NEAR = 1e-3


@dataclass(frozen=True)
class Comparison:
    """One model trained from one seed, eagerly and under Kitsune."""

    model: str
    form: str
    steps: int
    warmup: int
    seed: int
    eager: TrainResult
    lazy: TrainResult
    numerics: str = "bitwise"

    def differing(self) -> dict[str, list[str]]:
        """The names of what is not bit-identical, by kind; empty lists when all is well."""
        losses = (dict(enumerate_losses(result)) for result in (self.eager, self.lazy))
        return {
            "losses": unequal(*losses),
            "gradients": unequal(self.eager.grads, self.lazy.grads),
            "parameters": unequal(self.eager.params, self.lazy.params),
        }

    def identical(self) -> bool:
        return not any(self.differing().values())

    def distance(self) -> float:
        """The largest relative distance of a loss from eager's."""
        pairs = zip(self.lazy.losses, self.eager.losses, strict=True)
        return max((abs(a - b) / abs(b) if b else abs(a) for a, b in pairs), default=0.0)

    def agrees(self) -> bool:
        """Are all numbers eager's or, in strict numerics, all losses near enough?"""
        return self.identical() or (self.numerics == "strict" and self.distance() <= NEAR)

    def ratio(self) -> float:
        """Median step under Kitsune over the median eager step: above 1 it is slower."""
        return statistics.median(self.lazy.step_seconds) / statistics.median(self.eager.step_seconds)

    def to_dict(self) -> dict[str, Any]:
        report = self.lazy.report
        return {
            "model": self.model,
            "form": self.form,
            "steps": self.steps,
            "warmup": self.warmup,
            "seed": self.seed,
            "numerics": self.numerics,
            "identical": self.identical(),
            "loss_distance": self.distance(),
            "differing": self.differing(),
            "losses": {"eager": self.eager.losses, "kitsune": self.lazy.losses},
            "step_ms": {"eager": spread_ms(self.eager), "kitsune": spread_ms(self.lazy), "ratio": self.ratio()},
            "peak_bytes": {"eager": self.eager.peak_bytes, "kitsune": self.lazy.peak_bytes},
            "counters": self.lazy.counters,
            "explain": {} if report is None else report.to_dict(),
        }


def enumerate_losses(result: TrainResult) -> list[tuple[str, Tensor]]:
    return [(f"step {i}", torch.tensor(loss)) for i, loss in enumerate(result.losses, start=1)]


def unequal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> list[str]:
    return [name for name in {**a, **b} if name not in a or name not in b or not same_bits(a[name], b[name])]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Stricter than `torch.equal`, for which 0.0 is -0.0 and a NaN never equals itself."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))


def spread_ms(result: TrainResult) -> dict[str, float]:
    """Median and quartiles: the first steps warm up, and would pull a mean."""
    times = [1e3 * s for s in result.step_seconds]
    if len(times) == 1:
        return {"q1": times[0], "median": times[0], "q3": times[0]}
    q1, median, q3 = statistics.quantiles(times, n=4, method="inclusive")
    return {"q1": q1, "median": median, "q3": q3}
