"""Training under Kitsune leaves what eager leaves, bit for bit: the demo models for 50 steps, and small networks of each kind."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kitsune
from kitsune.demo.train import FORMS, MODELS, TrainResult, train
from kitsune.lazy import LazyTensor

pytest.importorskip("sklearn")
STEPS = 50
DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]


@lru_cache
def eager(model: str, device: str) -> TrainResult:
    return train(model, None, steps=STEPS, device=torch.device(device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("warmup", [0, 1])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model", MODELS)
def test_demo_is_identical_to_eager_after_50_steps(model: str, form: str, warmup: int, device: str) -> None:
    expected = eager(model, device)
    got = train(model, form, steps=STEPS, device=torch.device(device), warmup=warmup)
    assert got.losses == expected.losses
    for mine, theirs in ((got.grads, expected.grads), (got.params, expected.params)):
        assert mine.keys() == theirs.keys()
        assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
    counters: Any = got.counters
    assert counters["recorded"] > 40 * 50, "nearly every step is recorded lazily, and a step has more than 50 ops"
    assert counters["recognised"] >= 45, "nearly every step is a region seen before"


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(11, 16), nn.Linear(16, 5)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.layer(self.embed(x)).mean(1))
        return out


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(10, 16, batch_first=True), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.lstm(x)[0][:, -1])
        return out


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 5))


def conv() -> nn.Module:
    features = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 3)]
    return nn.Sequential(*features, nn.Flatten(), nn.Dropout(0.3), nn.Linear(16, 5))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (6, 10)),
    "conv": (conv, (6, 3, 8, 8)),
    "attention": (Attention, ()),
    "recurrent": (Recurrent, (6, 7, 10)),
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 1e-2),
    "adamw foreach": lambda p: torch.optim.AdamW(p, 1e-2, foreach=True),
    "adam fused": lambda p: torch.optim.Adam(p, 1e-2, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-2, momentum=0.9, centered=True),
    "lbfgs": lambda p: torch.optim.LBFGS(p, max_iter=3),
}


class Loop:
    """A training loop with a schedule and clipping, and what it leaves."""

    def __init__(self, network: str, optimizer: str, device: str) -> None:
        make, self.shape = NETWORKS[network]
        torch.manual_seed(1)
        self.device = device
        self.model = make().to(device)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)
        self.generator = torch.Generator().manual_seed(3)
        self.losses: list[Tensor] = []

    def step(self) -> None:
        generator, shape = self.generator, self.shape
        x = torch.randn(shape, generator=generator) if shape else torch.randint(0, 11, (6, 9), generator=generator)
        target = torch.randint(0, 5, (6,), generator=generator).to(self.device)
        x = x.to(self.device)

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.model(x), target)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
            return loss

        if isinstance(self.optimizer, torch.optim.LBFGS):
            self.losses.append(self.optimizer.step(closure))  # type: ignore[arg-type]
        else:
            self.losses.append(closure())
            self.optimizer.step()
        self.schedule.step()

    def left(self) -> list[Tensor]:
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        return [*(loss.detach() for loss in self.losses), *self.model.parameters(), *grads, *self.model.buffers()]


# On CUDA, of eager too: attention's backward may not be deterministic, and an LSTM's weights are copied together at each call.
@pytest.mark.filterwarnings("ignore:Memory Efficient attention:UserWarning", "ignore:RNN module weights:UserWarning")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("warmup", [0, 1])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("network", NETWORKS)
def test_a_loop_leaves_what_eager_leaves(network: str, optimizer: str, warmup: int, device: str) -> None:
    torch.use_deterministic_algorithms(device == "cuda", warn_only=True)
    kitsune.reset()
    loop, plain = Loop(network, optimizer, device), Loop(network, optimizer, device)
    torch.manual_seed(5)
    for _ in range(4):
        plain.step()
    torch.manual_seed(5)
    with kitsune.accelerate(warmup=warmup, device=device):
        for _ in range(4):
            loop.step()
    torch.use_deterministic_algorithms(False)
    for mine, theirs in zip(loop.left(), plain.left(), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.stride() == theirs.stride()
    assert kitsune.counters()["recognised"] >= 2
    kept = [p.grad for p in loop.model.parameters()] + [v for s in loop.optimizer.state.values() for v in s.values()]
    assert not any(isinstance(t, LazyTensor) for t in kept), "gradients and state are plain tensors after a step"
