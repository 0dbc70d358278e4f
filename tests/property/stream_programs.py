"""Training steps of the kinds that people write, small: each maker returns a step to be called again and again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

Step = Callable[[], Any]
PROGRAMS: dict[str, Callable[[], Step]] = {}


def program(make: Callable[[], Step]) -> Callable[[], Step]:
    PROGRAMS[make.__name__] = make
    return make


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


def _trainer(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, loss: Callable[..., Any]) -> Step:
    def step() -> None:
        optimizer.zero_grad()
        loss(model(x)).backward()
        optimizer.step()

    return step


def _classes(logits: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, torch.arange(len(logits)) % logits.shape[-1])


@program
def mlp_sgd() -> Step:
    model = _mlp()
    return _trainer(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), torch.randn(8, 6), _classes)


@program
def mlp_adam_foreach() -> Step:
    model = _mlp()
    return _trainer(model, torch.optim.Adam(model.parameters(), foreach=True), torch.randn(8, 6), _classes)


@program
def mlp_adamw() -> Step:
    model = _mlp()
    return _trainer(model, torch.optim.AdamW(model.parameters(), foreach=False), torch.randn(8, 6), _classes)


@program
def conv_net() -> Step:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    return _trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), torch.randn(5, 2, 6, 6), _classes)


@program
def transformer_layer() -> Step:
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)
    return _trainer(model, torch.optim.AdamW(model.parameters(), foreach=True), torch.randn(3, 5, 8), torch.mean)


@program
def lstm_cell() -> Step:
    cell, x = nn.LSTMCell(4, 6), torch.randn(3, 2, 4)

    def step() -> None:
        state = None
        for t in range(3):
            state = cell(x[t], state)
        cell.zero_grad()
        state[0].pow(2).mean().backward()

    return step


@program
def views_and_writes() -> Step:
    weight, buffer = nn.Parameter(torch.randn(4, 4)), torch.zeros(4, 4)

    def step() -> None:
        y = (weight * 2).clone()
        y[1:].add_(1)
        y.t()[0] *= 3
        buffer.mul_(0.5).add_(y.detach())
        buffer[:, 1].zero_()
        weight.grad = None
        (y.view(2, 8).select(0, 1) * buffer.flatten()[:8]).sum().backward()

    return step


@program
def double_backward() -> Step:
    model, x = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)), torch.randn(6, 4)

    def step() -> None:
        inputs = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(inputs).sum(), inputs, create_graph=True)
        model.zero_grad()
        ((slope.norm(dim=1) - 1) ** 2).mean().backward()

    return step


@program
def checkpointed_block() -> Step:
    block, x = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Dropout(0.5), nn.Linear(8, 4)), torch.randn(5, 4)

    def step() -> None:
        block.zero_grad()
        checkpoint(block, x, use_reentrant=False).pow(2).sum().backward()

    return step


@program
def grad_accumulation() -> Step:
    model = _mlp()
    optimizer, batches = torch.optim.SGD(model.parameters(), lr=0.1), torch.randn(3, 4, 6)

    def step() -> None:
        for batch in batches:
            (_classes(model(batch)) / 3).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


@program
def clipped() -> Step:
    model = _mlp()
    optimizer, x = torch.optim.SGD(model.parameters(), lr=0.1), torch.randn(8, 6)

    def step() -> None:
        optimizer.zero_grad()
        _classes(model(x)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()

    return step


@program
def embedding_language_model() -> Step:
    model, tokens = (
        nn.Sequential(nn.Embedding(11, 8), nn.LayerNorm(8), nn.Linear(8, 11)),
        torch.arange(20).view(4, 5) % 11,
    )
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        F.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(-1, 1).flatten()).backward()
        optimizer.step()

    return step
