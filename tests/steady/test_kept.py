"""A loop that keeps every loss and an activation of every step finds in them what eager gives, however often memory is reused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import kitsune
from kitsune.config import config
from tests._compare import difference
from tests.steady.loops import NONE, OPTIMIZERS, WHERE, device_of, graphs_of, mlp

STEPS, BATCHES = 1000, 16
pytestmark = pytest.mark.usefixtures("repeatable")


def kept(device: str, context: Any) -> list[Tensor]:
    torch.manual_seed(0)
    model = mlp().to(device)
    optimizer = OPTIMIZERS["SGD with momentum"](model.parameters())
    xs, target = torch.randn(BATCHES, 8, 8, 8).to(device), torch.randint(0, 5, (8,)).to(device)
    found: list[Tensor] = []
    with context:
        for step in range(STEPS):
            hidden = model[:3](xs[step % BATCHES])
            part = hidden[3] if step % 3 else hidden.detach().t()
            loss = F.cross_entropy(model[3:](hidden), target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            # With what they carry of a graph, or without; a view of the activation beside the whole.
            found += [loss, hidden, part] if step % 3 else [loss.detach(), hidden.detach(), part]
    return found


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "op by op"])
def test_a_thousand_losses_and_activations_are_as_in_eager(fuse: bool, where: str) -> None:
    expected = kept(device_of(where), NONE)
    with config.patch(fuse=fuse), graphs_of(where):
        got = kept(device_of(where), kitsune.accelerate(device=device_of(where)))
        counters = kitsune.counters()
    assert len(got) == len(expected) == 3 * STEPS
    wrong = [(i, told) for i, (a, b) in enumerate(zip(expected, got, strict=True)) if (told := difference(a, b, skip=SKIP))]
    assert not wrong, wrong[:3]
    assert counters["recognised"] > 0.9 * STEPS and counters["followed"] > 6 * STEPS, counters
    assert counters["backwards_followed"] > 0.9 * STEPS, counters
    if where != "cpu":
        assert counters["replayed"] > 0.9 * STEPS, counters
        assert counters["moved"] > STEPS, counters


@pytest.mark.parametrize("where", WHERE[1:])
def test_a_loss_that_is_detached_and_read_after_the_step_is_moved_out_of_the_way(where: str) -> None:
    """The view is made in a region of its own, which starts nothing: the next step is replayed all the same."""
    device, steps = device_of(where), 40

    def train(context: Any) -> list[Any]:
        torch.manual_seed(0)
        model = mlp().to(device)
        optimizer = OPTIMIZERS["SGD with momentum"](model.parameters())
        x, target, found = torch.randn(8, 8, 8).to(device), torch.randint(0, 5, (8,)).to(device), []
        with context:
            for _ in range(steps):
                loss = F.cross_entropy(model(x), target)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                detached = loss.detach()
                found += [detached.item(), detached]
        return [x.item() if isinstance(x, Tensor) else x for x in found]

    expected = train(NONE)
    with config.patch(fuse=False), graphs_of(where):
        assert train(kitsune.accelerate(device=device)) == expected
        counters = kitsune.counters()
    assert counters["replayed"] >= steps - 6 and not counters["graph_missed"], counters


# A wrapper's own name of its history may lead through the view that it was made by.
SKIP = ("history",)
