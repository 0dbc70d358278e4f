"""A step from the same state leaves the same bits, however often the state is put back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kitsune
from kitsune.config import config
from tests.steady.loops import OPTIMIZERS, WHERE, device_of, graphs_of, mlp

TIMES = {"cpu": 400, "replayed": 400, "cuda": 10_000}
pytestmark = pytest.mark.usefixtures("repeatable")
INTS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


class Restored:
    """A model and its optimizer after three steps, and the state that they are put back to."""

    def __init__(self, optimizer: str, device: str) -> None:
        torch.manual_seed(0)
        self.device = device
        self.model: nn.Module = mlp().to(device)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.x, self.target = torch.randn(8, 8, 8).to(device), torch.randint(0, 5, (8,)).to(device)
        for _ in range(3):
            self.step()
        self.saved = copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict()))
        self.generator = self.random.get_rng_state()

    @property
    def random(self) -> Any:
        return torch.cuda if self.device == "cuda" else torch

    def step(self) -> Tensor:
        loss = F.cross_entropy(self.model(self.x), self.target)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def restore(self) -> None:
        """By the doors that a program has."""
        model, optimizer = self.saved
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(copy.deepcopy(optimizer))
        self.random.set_rng_state(self.generator)

    def restore_in_place(self) -> None:
        """Into the memory that the state is in."""
        model, optimizer = self.saved
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                value.copy_(model[name])
            for k, state in enumerate(self.optimizer.state.values()):
                for name, value in state.items():
                    if isinstance(value, Tensor):
                        value.copy_(optimizer["state"][k][name])
        self.random.set_rng_state(self.generator)

    def bits(self, loss: Tensor) -> Tensor:
        """All that a step leaves, in one tensor of bytes."""
        state = [v for entry in self.optimizer.state.values() for v in entry.values() if isinstance(v, Tensor)]
        tensors = [loss, *self.model.parameters(), *(v.to(self.device) for v in state)]
        with torch.no_grad():
            return torch.cat([t.detach().reshape(-1) for t in tensors]).view(torch.int32)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "load_state_dict"])
@pytest.mark.parametrize("optimizer", ["fused AdamW", "SGD with momentum"])
def test_the_same_state_gives_the_same_bits_each_time(optimizer: str, in_place: bool, where: str) -> None:
    times = TIMES[where] // (1 if in_place and optimizer == "fused AdamW" else 10)
    training = Restored(optimizer, device_of(where))
    restore = training.restore_in_place if in_place else training.restore
    expected = training.bits(training.step())
    restore()
    training.bits(training.step())
    wrong = torch.zeros((), dtype=torch.int64, device=training.device)
    with config.patch(fuse=False), graphs_of(where), kitsune.accelerate(device=training.device):
        for _ in range(times):
            restore()
            loss = training.step()
            with kitsune.disable():
                wrong += (training.bits(loss) != expected).any()
        counters = kitsune.counters()
    assert int(wrong) == 0, f"{int(wrong)} of {times} steps have left other bits"
    assert counters["recognised"] > 0.9 * times and counters["followed"] > 10 * times, counters
    assert counters["backwards_followed"] > 0.9 * times, counters
    if where != "cpu" and in_place:
        # `load_state_dict` gives an optimizer other tensors each time, which no graph can have been captured with.
        assert counters["replayed"] > 0.9 * times, counters
