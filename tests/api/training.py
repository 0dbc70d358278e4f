"""Small trainings that the tests of the documents' API share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Step = Callable[[nn.Module, Any, Tensor, Tensor], Tensor]


def small_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 4))


def batches(n: int, size: int = 6) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(size, 8, generator=generator), torch.randint(0, 4, (size,), generator=generator)) for _ in range(n)]


def plain_step(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> Tensor:
    """A step of a loop that knows nothing of Kitsune."""
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.detach()


def train(model: nn.Module, optimizer: Any, n: int, step: Step = plain_step, first: int = 0) -> dict[str, Tensor]:
    """What `n` steps leave: losses, parameters, buffers and optimizer state, under names."""
    losses = [step(model, optimizer, x, y) for x, y in batches(first + n)[first:]]
    left = {f"loss {k}": loss.clone() for k, loss in enumerate(losses)}
    left |= {name: value.detach().clone() for name, value in model.state_dict().items()}
    for k, state in enumerate(optimizer.state.values()):
        left |= {f"{name} {k}": value.clone() for name, value in state.items() if isinstance(value, Tensor)}
    return left


def differences(expected: dict[str, Tensor], got: dict[str, Tensor]) -> list[str]:
    """The names under which the two differ in any bit."""
    assert expected.keys() == got.keys(), expected.keys() ^ got.keys()
    return [name for name, value in expected.items() if not torch.equal(value, got[name])]
