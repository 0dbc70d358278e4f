"""How much is run, and how it is compared and counted."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import kitsune
from tests import _compare

COUNTS = ("run", "equal", "different", "crashed")
FULL = os.environ.get("CHAOS") == "full"
NO_BACKWARD_IN_FORKS = "a process in which autograd has threads for devices has no backward in its forks"


def many(few: int, full: int) -> int:
    """How often: a few in a normal run, the full figure in `make chaos`."""
    return full if FULL else few


def lazily(warmup: int = 1) -> Any:
    return kitsune.accelerate(warmup=warmup, device="cpu")


class Counts:
    """Compares outcomes with eager's and counts them."""

    def __init__(self) -> None:
        self.numbers: Counter[str] = Counter()
        self.told: list[str] = []

    def compare(self, name: str, expected: Any, got: Any) -> None:
        """Count one comparison."""
        self.numbers["run"] += 1
        difference = _difference(expected, got)
        self.numbers["different" if difference else "equal"] += 1
        if difference:
            self.told.append(f"{name}: {difference}")

    def check(self, name: str, program: Callable[[Any], Any], context: Callable[[], Any] = lazily) -> None:
        """Run a program with no context, then with one, and compare what it returns."""
        expected = program(contextlib.nullcontext)
        try:
            got = program(context)
        except Exception as error:
            self.numbers["run"] += 1
            self.numbers["crashed"] += 1
            self.told.append(f"{name}: {type(error).__name__}: {error}")
        else:
            self.compare(name, expected, got)


def _difference(a: Any, b: Any) -> str | None:
    if isinstance(a, (list, tuple)):
        if type(a) is not type(b) or len(a) != len(b):
            return f"{str(b)[:200]} instead of {str(a)[:200]}"
        return next((f"[{i}] {told}" for i, (x, y) in enumerate(zip(a, b, strict=True)) if (told := _difference(x, y))), None)
    return _compare.difference(a, b, skip=("history",))


class Loop:
    """A small training, the same for a seed whoever runs it."""

    def __init__(self, seed: int = 0, momentum: float = 0.9) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3))
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=momentum)
        self.xs = [torch.randn(4, 6, generator=generator) for _ in range(16)]
        self.ys = [torch.randint(0, 3, (4,), generator=generator) for _ in range(16)]
        self.losses: list[Tensor] = []

    def on(self, device: str) -> Loop:
        """The same on a device, before the first step."""
        self.model.to(device)
        self.xs, self.ys = ([t.to(device) for t in ts] for ts in (self.xs, self.ys))
        return self

    def loss(self, i: int) -> Tensor:
        return nn.functional.cross_entropy(self.model(self.xs[i % 16]), self.ys[i % 16])

    def step(self, i: int) -> None:
        loss = self.loss(i)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.detach())

    def state(self) -> list[Tensor]:
        """All that the training has left behind."""
        momenta = [
            state["momentum_buffer"] for state in self.optimizer.state.values() if state.get("momentum_buffer") is not None
        ]
        return [t.detach().clone() for t in (*self.losses, *self.model.parameters(), *momenta)]
