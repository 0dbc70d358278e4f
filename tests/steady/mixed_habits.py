"""What programs do before every step, for `mixed.py`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from tests.steady.mixed_changes import last_linear

# Of a training; returns what the program looks at.
HABITS: dict[str, Callable[[Any], Any]] = {}


def habit(make: Any) -> Any:
    HABITS[make.__name__] = make
    return make


@habit
def parity(t: Any) -> None:
    t.scale = 1.0 if t.k % 2 else 2.0


@habit
def scheduled(t: Any) -> None:
    for group in t.optimizer.param_groups:
        group["lr"] *= 0.95


@habit
def moving_average(t: Any) -> Any:
    if t.averaged is None:
        t.averaged = copy.deepcopy(t.net)
    with torch.no_grad():
        for a, b in zip(t.averaged.parameters(), t.net.parameters(), strict=False):
            if a.shape == b.shape:
                a.lerp_(b.to(a.dtype), 0.1)


@habit
def kept_results(t: Any) -> Any:
    """The parameters, and gradients, of some steps."""
    if t.k % 3 == 0:
        t.kept.append([p.detach().clone() for p in t.net.parameters()])
        t.kept.append([p.grad for p in t.net.parameters()])


@habit
def measured(t: Any) -> Any:
    """Norms of all gradients, as numbers for a log."""
    return [float(p.grad.norm()) for p in t.net.parameters() if p.grad is not None and not p.grad.is_sparse]


@habit
def toggled(t: Any) -> None:
    """One layer's gradients come and go."""
    last_linear(t).weight.requires_grad_(t.k % 3 != 1)


@habit
def growing_noise(t: Any) -> None:
    with torch.no_grad():
        last_linear(t).weight.add_(torch.randn(last_linear(t).weight.shape).to(t.dtype), alpha=0.001 * t.k)


@habit
def replayed_batch(t: Any) -> None:
    t.notes["same batch"] = t.k % 4 == 3


@habit
def sometimes_without(t: Any) -> None:
    torch.set_grad_enabled(t.k % 5 != 4)


@habit
def printed(t: Any) -> Any:
    return repr(last_linear(t).weight)[:60], last_linear(t).weight.grad is None
