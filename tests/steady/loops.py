"""Training loops as people write them, to be run by eager and under Kitsune, and compared bit for bit."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kitsune
from tests._compare import difference
from tests.runtime.checked import forget
from tests.runtime.repeated import graphs

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]
# "replayed": on the CPU, with work that is done again into the memory of its first time in the place of CUDA graphs.
WHERE = [pytest.param("cpu"), pytest.param("replayed"), pytest.param("cuda", marks=pytest.mark.gpu)]


NONE = contextlib.nullcontext()


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Eager's kernels give the same bits each time, and nothing is known of any region."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        forget()
        try:
            yield
        finally:
            forget()
            torch.use_deterministic_algorithms(False)


def graphs_of(where: str) -> Any:
    """A context in which regions are replayed there."""
    return graphs(kernels=False) if where == "replayed" else contextlib.nullcontext()


def device_of(where: str) -> str:
    return "cpu" if where == "replayed" else where


class Drop(nn.Module):
    """Dropout whose mask is the same in every dtype."""

    def forward(self, x: Tensor) -> Tensor:
        mask = F.dropout(torch.ones(x.shape, device=x.device), 0.1, self.training)
        return x * mask.to(x.dtype)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.drop: nn.Module = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.first(x)).view(batch, length, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, length, width)
        x = x + self.drop(self.out(attended))
        return x + self.drop(self.narrow(F.gelu(self.wide(self.second(x)))))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.GELU(), nn.Dropout(0.1), nn.LayerNorm(32), nn.Linear(32, 5))


def convolutions() -> nn.Module:
    layers = [nn.Unflatten(1, (1, 8)), nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.1)]
    return nn.Sequential(*layers, nn.Conv2d(4, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 5))


def transformer() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), Block(16), nn.LayerNorm(16), nn.Flatten(), nn.Linear(128, 5))


def same_masks(model: nn.Module) -> nn.Module:
    """The model, with dropout as `Drop` has it."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Dropout):
                setattr(module, name, Drop())
    return model


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "fused AdamW": lambda p: torch.optim.AdamW(p, 3e-3, fused=True),
    "foreach Adam": lambda p: torch.optim.Adam(p, 3e-3, foreach=True),
    "SGD with momentum": lambda p: torch.optim.SGD(p, 0.03, momentum=0.9, nesterov=True),
}


@dataclass
class Loop:
    """An epoch is 50 optimizer steps of 3 micro-batches, the last of them short, with an evaluation in the middle.

    `kept` is every loss. `marks` are what `counters()` and `after_epoch()` told after each epoch.
    """

    make: Callable[[], nn.Module] = mlp
    optimizer: str = "foreach Adam"
    item: bool = False
    none: bool = True
    dtype: torch.dtype = torch.float32
    per_epoch: int = 50
    kept: list[Tensor] = field(default_factory=list)
    read: list[float] = field(default_factory=list)
    marks: list[dict[str, Any]] = field(default_factory=list)

    def train(self, device: str, n_steps: int, context: Any = NONE, after_epoch: Any = dict) -> None:
        torch.manual_seed(0)
        self.model = self.make().to(device, self.dtype)
        self.updater = OPTIMIZERS[self.optimizer](self.model.parameters())
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.updater, n_steps)
        batches = [self.batch(step, micro, device) for step in range(n_steps) for micro in range(3)]
        with context:
            for step in range(n_steps):
                if step % self.per_epoch == self.per_epoch // 2:
                    self.evaluate(device)
                for x, target in batches[3 * step : 3 * step + 3]:
                    loss = F.cross_entropy(self.model(x), target)
                    (loss / 3).backward()
                    self.kept.append(loss.detach())
                    if self.item:
                        self.read.append(loss.item())
                nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
                self.updater.step()
                schedule.step()
                self.updater.zero_grad(set_to_none=self.none)
                if (step + 1) % self.per_epoch == 0:
                    self.marks.append({**kitsune.counters(), **after_epoch()})

    def batch(self, step: int, micro: int, device: str) -> tuple[Tensor, Tensor]:
        n = 5 if (step + 1) % self.per_epoch == 0 and micro == 2 else 8
        return torch.randn(n, 8, 8).to(device, self.dtype), torch.randint(0, 5, (n,)).to(device)

    def evaluate(self, device: str) -> None:
        self.model.eval()
        with torch.no_grad():
            self.kept.append(self.model(torch.ones(16, 8, 8, device=device, dtype=self.dtype)).square().mean())
        self.model.train()

    def left(self) -> dict[str, Tensor]:
        """Everything that training leaves."""
        named: dict[str, Tensor] = {f"loss {i}": loss.detach() for i, loss in enumerate(self.kept)}
        named |= self.model.state_dict()
        for name, p in self.model.named_parameters():
            if p.grad is not None:
                named[f"{name}.grad"] = p.grad
            state = self.updater.state[p]
            named |= {f"{name}.{k}": v for k, v in state.items() if isinstance(v, Tensor)}
        named["generator"] = torch.cuda.get_rng_state(p.device) if p.is_cuda else torch.get_rng_state()
        return named


def differences(expected: dict[str, Tensor], got: dict[str, Tensor]) -> list[str]:
    """What tells one training from another, in words."""
    if expected.keys() != got.keys():
        return [f"{sorted(expected.keys() ^ got.keys())} are there only once"]
    return [f"{name}: {told}" for name in expected if (told := difference(expected[name], got[name]))]
