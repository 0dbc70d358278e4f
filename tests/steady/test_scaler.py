"""Mixed precision with GradScaler: the steps that overflow are skipped, the scale shrinks and grows, and every bit is eager's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kitsune
from kitsune.config import config
from tests.steady.loops import DEVICES, NONE, OPTIMIZERS, differences, same_masks, transformer

STEPS, GROWTH = 60, 7
pytestmark = pytest.mark.usefixtures("repeatable")


class Scaled:
    """A training in half precision whose first scales are too large, as is each one that the scaler grows to later."""

    def __init__(self, optimizer: str, clip: bool, device: str) -> None:
        torch.manual_seed(0)
        self.device, self.clip = device, clip
        self.model = same_masks(transformer()).to(device)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.scaler = torch.amp.GradScaler(device, init_scale=2.0**24, growth_interval=GROWTH)
        self.xs, self.ys = torch.randn(STEPS, 4, 8, 8).to(device), torch.randint(0, 5, (STEPS, 4)).to(device)
        self.losses: list[Tensor] = []
        self.scales: list[float] = []

    def train(self, context: Any) -> None:
        torch.manual_seed(1)
        with context:
            for x, target in zip(self.xs, self.ys, strict=True):
                with torch.autocast(self.device, torch.float16):
                    loss = F.cross_entropy(self.model(x), target)
                self.scaler.scale(loss).backward()
                if self.clip:
                    self.scaler.unscale_(self.optimizer)
                    nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
                self.scaler.step(self.optimizer)
                self.scaler.update()
                self.optimizer.zero_grad()
                self.losses.append(loss.detach())
                self.scales.append(self.scaler.get_scale())

    def left(self) -> dict[str, Tensor]:
        named = {f"loss {i}": loss for i, loss in enumerate(self.losses)} | self.model.state_dict()
        for k, state in enumerate(self.optimizer.state.values()):
            named |= {f"{name} {k}": v for name, v in state.items() if isinstance(v, Tensor)}
        return named


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("clip", [True, False], ids=["clipped", "unclipped"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_steps_that_overflow_are_skipped_as_in_eager(optimizer: str, clip: bool, device: str) -> None:
    expected, got = Scaled(optimizer, clip, device), Scaled(optimizer, clip, device)
    expected.train(NONE)
    with config.patch(fuse=False):
        got.train(kitsune.accelerate(device=device))
    assert not differences(expected.left(), got.left())
    assert got.scales == expected.scales and got.scaler.state_dict() == expected.scaler.state_dict()
    # Overflows come when the region is long known: three at least in the last forty steps, with as many growths between them.
    late = list(zip(got.scales[19:], got.scales[20:], strict=False))
    assert sum(after < before for before, after in late) >= 3 <= sum(after > before for before, after in late), got.scales
    counters = kitsune.counters()
    assert counters["recognised"] > STEPS and counters["followed"] > 20 * STEPS, counters
    assert counters["backwards_followed"] > STEPS // 2, counters
    assert device == "cpu" or counters["replayed"] > STEPS / 2, counters
