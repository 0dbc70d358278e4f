"""Training steps for the tests of static functions: the same program runs as plain PyTorch and under `static=True`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kitsune

STEPS = 14
Seen = list[Any]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def dropping() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.ReLU(inplace=True), nn.Dropout(0.2), nn.Linear(8, 3))


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 3))


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, fused=True)


class Training:
    """A training whose step is `self.step`; `n_python` counts how often its Python ran."""

    def __init__(
        self,
        model: Callable[[], nn.Module] = mlp,
        optimizer: Callable[..., Any] = sgd,
        static: bool = False,
        device: str = "cpu",
        body: Callable[..., Any] | None = None,
        **options: Any,
    ) -> None:
        torch.manual_seed(5)
        self.device = torch.device(device)
        self.model = model().to(self.device)
        self.optimizer = optimizer(self.model.parameters())
        # Probabilities, not classes: while a graph is recorded on a CPU its inputs are not there yet, and are no valid index.
        self.xs, self.ys = torch.randn(40, 4, 6).to(device), torch.randn(40, 4, 3).softmax(-1).to(device)
        self.n_python = 0
        self.kept: Seen = []
        step = body or Training.plain

        def whole(x: Tensor, y: Tensor) -> Any:
            self.n_python += 1
            return step(self, x, y)

        self.step = kitsune.accelerate(whole, static=True, device=device, **options) if static else whole

    def plain(self, x: Tensor, y: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(x), y)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def take(self, i: int) -> Any:
        """One step, on batch number `i`."""
        returned = self.step(self.xs[i], self.ys[i])
        self.kept.append(returned)
        return returned

    def found(self) -> Seen:
        """All that a program could look at."""
        state = [t for held in self.optimizer.state.values() for t in held.values() if isinstance(t, Tensor)]
        gradients = [p.grad if p.grad is not None else torch.tensor(-1.0) for p in self.model.parameters()]
        versions = torch.tensor([p._version for p in (*self.model.parameters(), *self.model.buffers())])
        draw = torch.rand(3, device=self.device)
        return [*self.kept, *self.model.parameters(), *self.model.buffers(), *state, *gradients, versions, draw]


def agree(expected: Any, got: Any) -> bool:
    """Are these the same, down to the last bit?"""
    if isinstance(expected, Tensor):
        assert torch.equal(expected, got.detach()), f"{got} instead of {expected}"
        return True
    if isinstance(expected, (list, tuple)):
        assert type(expected) is type(got) and len(expected) == len(got)
        return all(map(agree, expected, got))
    if isinstance(expected, dict):
        return list(expected) == list(got) and all(map(agree, expected.values(), got.values()))
    assert type(expected) is type(got) and expected == got
    return True


def compare(
    drive: Callable[[Training], None], *, at_most: int, at_least: int = 0, **options: Any
) -> tuple[Training, dict[str, Any]]:
    """Run a program twice; the Python of the static step runs between `at_least` and `at_most` times."""
    eager, static = Training(**options), Training(static=True, **options)
    found = []
    for training in (eager, static):
        torch.manual_seed(9)
        if training is static:
            kitsune.reset()
        drive(training)
        found.append(training.found())
    agree(*found)
    counters = kitsune.counters()
    assert at_least <= static.n_python <= at_most, (static.n_python, counters["static_refused"])
    assert static.n_python + counters["static_skipped"] == eager.n_python
    return static, counters


def straight(n: int = STEPS) -> Callable[[Training], None]:
    """So many steps, one after another."""

    def drive(training: Training) -> None:
        for i in range(n):
            training.take(i)

    return drive


def meddling(meddle: Callable[[Training], None], at: int = 8, n: int = 20) -> Callable[[Training], None]:
    """The same, with something done before step number `at`."""

    def drive(training: Training) -> None:
        for i in range(n):
            if i == at:
                meddle(training)
            training.take(i)

    return drive


def no_context() -> Any:
    return contextlib.nullcontext()
