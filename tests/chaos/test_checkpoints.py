"""Checkpointing in each form, with the context around the forward, the backward or both, with and without dropout."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

from tests.chaos.counting import Counts, lazily

Form = Callable[[nn.Module, Tensor], Tensor]


def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op is torch.ops.aten.addmm.default else CheckpointPolicy.PREFER_RECOMPUTE


def late(model: nn.Module, x: Tensor) -> Tensor:
    with set_checkpoint_early_stop(False):
        result: Tensor = checkpoint(model, x, use_reentrant=False)
    return result


def selective(model: nn.Module, x: Tensor) -> Tensor:
    contexts = partial(create_selective_checkpoint_contexts, policy)
    result: Tensor = checkpoint(model, x, use_reentrant=False, context_fn=contexts)
    return result


def nested(model: nn.Module, x: Tensor) -> Tensor:
    def outer(x: Tensor) -> Tensor:
        hidden: Tensor = checkpoint(model[:2], x, use_reentrant=False)  # type: ignore[index]
        return model[2:](hidden)  # type: ignore[index,no-any-return]

    result: Tensor = checkpoint(outer, x, use_reentrant=False)
    return result


FORMS: dict[str, Form] = {
    "reentrant": lambda model, x: checkpoint(model, x, use_reentrant=True),
    "not reentrant": lambda model, x: checkpoint(model, x, use_reentrant=False),
    "no early stop": late,
    "selective": selective,
    "nested": nested,
    "sequential": lambda model, x: checkpoint_sequential(model, 2, x, use_reentrant=False),
    "random state forgotten": lambda model, x: checkpoint(model, x, use_reentrant=False, preserve_rng_state=False),
}
WHERE = {"both": (True, True), "forward": (True, False), "backward": (False, True)}


# Where the random state is forgotten, gradients are of another mask by request.
CASES = [(form, dropout) for form in FORMS for dropout in (0.0, 0.4) if not (dropout and form == "random state forgotten")]


@pytest.mark.parametrize(("form", "dropout"), CASES)
def test_gradients_and_random_state(form: str, dropout: float, counts: Counts) -> None:
    for where, (forward, backward) in WHERE.items():
        for warmup in (0, 1):
            program = partial(train, FORMS[form], dropout, forward, backward)
            counts.check(f"{where}, warmup {warmup}", program, partial(lazily, warmup))


def train(form: Form, dropout: float, forward: bool, backward: bool, context: Callable[[], Any]) -> list[Tensor]:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(dropout), nn.Tanh(), nn.Linear(6, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    for _ in range(4):
        x = torch.randn(3, 4, requires_grad=True)
        # One context around both, or one that ends before the backward, or begins with it.
        with context() if forward and backward else contextlib.nullcontext():
            with context() if forward and not backward else contextlib.nullcontext():
                loss = form(model, x).square().mean()
            with context() if backward and not forward else contextlib.nullcontext():
                loss.backward()
                optimizer.step()
                seen += [loss.detach().clone(), x.grad.clone(), *(p.grad.clone() for p in model.parameters())]  # type: ignore
                optimizer.zero_grad()
    return [*seen, *(p.detach().clone() for p in model.parameters()), torch.get_rng_state()]
