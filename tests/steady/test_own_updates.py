"""Loops without an optimizer: a step is over where the program has written its parameters and calls on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import kitsune
from kitsune.ir import Barrier

STEPS, RATE = 24, 0.1
# Observed first, seen once more where something is new, and the last one may have no next.
NOT_FOLLOWED = 4
pytestmark = pytest.mark.usefixtures("repeatable")
Update = Callable[[list[Tensor]], None]


def subtracted(parameters: list[Tensor]) -> None:
    with torch.no_grad():
        for p in parameters:
            p -= RATE * p.grad  # type: ignore[operator]
            p.grad = None


def zeroed(parameters: list[Tensor]) -> None:
    with torch.no_grad():
        for p in parameters:
            p.add_(p.grad, alpha=-RATE)  # type: ignore[arg-type]
            p.grad.zero_()  # type: ignore[union-attr]


def copied(parameters: list[Tensor]) -> None:
    with torch.no_grad():
        for p in parameters:
            p.copy_(p - RATE * p.grad)  # type: ignore[operator]
    for p in parameters:
        p.grad = None


@torch.no_grad()
def at_once(parameters: list[Tensor]) -> None:
    torch._foreach_add_(parameters, [p.grad for p in parameters], alpha=-RATE)
    for p in parameters:
        p.grad = None


class Momentum:
    """An optimizer that torch does not know."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    @torch.no_grad()
    def __call__(self, parameters: list[Tensor]) -> None:
        self.kept = self.kept or [torch.zeros_like(p) for p in parameters]
        for p, kept in zip(parameters, self.kept, strict=True):
            kept.mul_(0.9).add_(p.grad)  # type: ignore[arg-type]
            p.sub_(kept, alpha=RATE)
            p.grad = None


UPDATES: dict[str, Callable[[], Update]] = {
    "subtracted": lambda: subtracted,
    "zeroed": lambda: zeroed,
    "copied": lambda: copied,
    "at once": lambda: at_once,
    "momentum": Momentum,
}


def trained(update: Update, reads: str, n_parts: int = 1, device: str = "cpu") -> list[Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).to(device)
    parameters, y, found = list(model.parameters()), torch.arange(8, device=device) % 3, list[Any]()
    for k, x in enumerate(torch.randn(STEPS * n_parts, 8, 6, device=device).unbind()):
        loss = cross_entropy(model(x), y) / n_parts
        if reads == "before":
            found.append(loss.item())
        loss.backward()
        if (k + 1) % n_parts == 0:
            update(parameters)
        if reads == "behind":
            found.append(loss.item())
        elif reads == "kept" or (reads == "now and then" and k % 10 == 9):
            found.append(loss.detach())
    return [float(one) for one in found] + [p.double().sum().item() for p in parameters]


@pytest.mark.parametrize("reads", ["before", "behind", "kept", "now and then", "nothing"])
@pytest.mark.parametrize("name", UPDATES)
def test_each_step_comes_back(name: str, reads: str, kitsunes: Any) -> None:
    expected = trained(UPDATES[name](), reads)
    with kitsunes():
        assert trained(UPDATES[name](), reads) == expected
    counters = kitsune.counters()
    assert counters["backwards_followed"] >= STEPS - NOT_FOLLOWED, counters
    # Seen at most twice, and what comes before the first step once.
    assert counters["recorded"] > 5 * counters["observed"] and counters["regions"] < 20, counters
    if reads in ("before", "kept", "nothing"):
        assert counters["flushed"]["UPDATE"] >= STEPS - 1, counters["flushed"]
        assert "the program has written its parameters itself" in str(kitsune.explain())


def test_no_step_ends_in_the_middle_of_a_call() -> None:
    """Where an operator comes from inside of one, autograd may hold a lock that the region's run asks for: a program hung."""
    x = torch.ones(3)
    kitsune.reset()
    with kitsune.config.patch(gate=False, follow=False), kitsune.accelerate(device="cpu", warmup=0):
        (pipeline,) = kitsune.contexts.here.depth
        for k in range(3):
            y = x * 2
            if not k:
                # As if a step had ended behind it.
                pipeline.recorder.region.node.full = Barrier.UPDATE
            assert (y + 1).tolist() == [3, 3, 3]
    assert "UPDATE" not in kitsune.counters()["flushed"]


@pytest.mark.parametrize("reads", ["before", "nothing"])
def test_gradients_of_several_parts_are_one_step(reads: str, kitsunes: Any) -> None:
    expected = trained(subtracted, reads, 3)
    with kitsunes():
        assert trained(subtracted, reads, 3) == expected
    counters = kitsune.counters()
    assert STEPS - 1 <= counters["flushed"]["UPDATE"] <= STEPS
    assert counters["backwards_followed"] >= 3 * (STEPS - NOT_FOLLOWED)


@pytest.mark.parametrize("reads", ["before", "kept", "nothing"])
def test_gradients_may_be_asked_for(reads: str, kitsunes: Any) -> None:
    """By `torch.autograd.grad`, which nothing is followed through: but the step comes back."""

    def losses() -> list[float]:
        torch.manual_seed(0)
        model, found = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)), list[Any]()
        y = torch.arange(8) % 3
        for x in torch.randn(STEPS, 8, 6).unbind():
            loss = cross_entropy(model(x), y)
            found += [loss.item()] if reads == "before" else [loss.detach()] if reads == "kept" else []
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            with torch.no_grad():
                for p, gradient in zip(model.parameters(), gradients, strict=True):
                    p -= RATE * gradient
        return [float(one) for one in found] + [p.double().sum().item() for p in model.parameters()]

    expected = losses()
    with kitsunes():
        assert losses() == expected
    counters = kitsune.counters()
    assert counters["flushed"]["UPDATE"] >= STEPS - 1 and counters["recorded"] > 5 * counters["observed"], counters


def clipped_first(model: nn.Module, optimizer: Any, closure: Callable[[], Tensor]) -> None:
    """Parameters are written before the backwards, and by torch's optimizer behind them."""
    with torch.no_grad():
        for p in model.parameters():
            p.clamp_(-1, 1)
    for _ in range(2):
        closure().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()


def decayed(model: nn.Module, optimizer: Any, closure: Callable[[], Tensor]) -> None:
    closure().backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.99)
    optimizer.step()
    optimizer.zero_grad()


def perturbed(model: nn.Module, optimizer: Any, closure: Callable[[], Tensor]) -> None:
    """Sharpness-aware: the gradient that is used is that of parameters a step up the first one's."""
    closure().backward()  # type: ignore[no-untyped-call]
    moved = [0.05 * p.grad for p in model.parameters()]  # type: ignore[operator]
    with torch.no_grad():
        for p, by in zip(model.parameters(), moved, strict=True):
            p.add_(by)
    optimizer.zero_grad()
    closure().backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for p, by in zip(model.parameters(), moved, strict=True):
            p.sub_(by)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize(("step", "n_ends"), [(clipped_first, 0), (decayed, 0), (perturbed, 1)])
def test_beside_an_optimizer_a_step_ends_with_its_own(step: Callable[..., None], n_ends: int, kitsunes: Any) -> None:
    def losses() -> list[float]:
        torch.manual_seed(0)
        model, found = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)), list[Tensor]()
        optimizer, y = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9), torch.arange(8) % 3
        for x in torch.randn(STEPS, 8, 6).unbind():

            def closure(x: Tensor = x) -> Tensor:
                found.append(cross_entropy(model(x), y))
                return found[-1]

            step(model, optimizer, closure)
        return [loss.item() for loss in found]

    expected = losses()
    with kitsunes():
        assert losses() == expected
    counters = kitsune.counters()
    assert counters["flushed"].get("UPDATE", 0) in range(n_ends * (STEPS - 1), n_ends * STEPS + 1)
    assert counters["backwards_followed"] >= STEPS - NOT_FOLLOWED


def test_what_is_no_parameter_may_be_written(kitsunes: Any) -> None:
    """Running means, between two backwards of one update."""

    def losses(mean: Tensor) -> list[float]:
        torch.manual_seed(0)
        model, found = nn.Linear(6, 3), list[Tensor]()
        optimizer, y = torch.optim.SGD(model.parameters(), lr=RATE), torch.arange(8) % 3
        for x in torch.randn(STEPS, 8, 6).unbind():
            for part in x.chunk(2):
                out = model(part)
                found.append(cross_entropy(out - mean, y[:4]))
                found[-1].backward()
                with torch.no_grad():
                    mean.lerp_(out.mean(0), 0.1)
            optimizer.step()
            optimizer.zero_grad()
        return [loss.item() for loss in found]

    expected = losses(torch.zeros(3))
    # A plain tensor, as one from outside is.
    mean = torch.zeros(3)
    with kitsunes():
        assert losses(mean) == expected
    assert "UPDATE" not in kitsune.counters()["flushed"]


def test_a_static_function_may_have_several() -> None:
    torch.manual_seed(0)
    batches, y = torch.randn(STEPS, 8, 6).unbind(), torch.arange(8) % 3

    def losses(static: bool) -> list[float]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))

        def step(x: Tensor) -> Tensor:
            for _ in range(2):
                loss = cross_entropy(model(x), y)
                loss.backward()  # type: ignore[no-untyped-call]
                subtracted([*model.parameters()])
            return loss.detach()

        called = kitsune.accelerate(step, device="cpu", static=True) if static else step
        return [called(x).item() for x in batches]

    expected = losses(False)
    kitsune.reset()
    with kitsune.config.patch(gate=False):
        assert losses(True) == expected
    counters = kitsune.counters()
    assert counters["static_skipped"] > STEPS // 2 and not counters["static_refused"] and counters["flushed"]["UPDATE"] >= 2


@pytest.mark.gpu
@pytest.mark.parametrize("reads", ["before", "nothing"])
def test_a_step_is_replayed(reads: str) -> None:
    expected = trained(subtracted, reads, device="cuda")
    kitsune.reset()
    with kitsune.config.patch(gate=False, fuse=False), kitsune.accelerate(device="cuda"):
        assert trained(subtracted, reads, device="cuda") == expected
        counters = kitsune.counters()
    assert counters["replayed"] >= STEPS - 2 * NOT_FOLLOWED and counters["backwards_followed"] >= STEPS - NOT_FOLLOWED
