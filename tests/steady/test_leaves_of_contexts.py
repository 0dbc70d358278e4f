"""Leaves that are made in a context get their gradients in each step, whatever was done with them before without gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kitsune
from tests.runtime.repeated import graphs

pytestmark = pytest.mark.usefixtures("repeatable")

LEAVES: dict[str, Callable[[Tensor], Tensor]] = {
    "made so": lambda like: torch.ones(like.shape, requires_grad=True),
    "made one": lambda like: torch.ones(like.shape).requires_grad_(),
    "detached": lambda like: (like * 2).detach().requires_grad_(),
    "a view": lambda like: torch.ones(2, *like.shape)[1].requires_grad_(),
}
# What a step begins with.
LOOKS: dict[str, Callable[[Tensor], Any]] = {
    "nothing": lambda t: None,
    "detached": lambda t: t.detach() * 2,
    "data": lambda t: t.data.sum(),
    "without gradients": lambda t: torch.no_grad()(t.mul)(2),
    "cloned": lambda t: t.detach().clone(),
    "compared": lambda t: (t > 0).sum(),
    "normed": lambda t: torch.no_grad()(torch.nn.utils.get_total_norm)([t]),
}


def gradients(leaf: str, look: str, context: Any, flushes: bool) -> list[Any]:
    torch.manual_seed(0)
    x, found, w = torch.randn(10, 3), list[Any](), nn.Parameter(torch.ones(3))
    with context:
        t = LEAVES[leaf](w)
        for k in range(10):
            seen = LOOKS[look](t)
            t.grad = w.grad = None
            ((t * x[k]).sum() + (w * x[k]).exp().sum()).backward()
            if flushes:
                kitsune.flush()
            found += [seen, t.grad, w.grad]
    return [t.tolist() if isinstance(t, Tensor) else t for t in found]


@pytest.mark.parametrize("flushes", [False, True], ids=["", "regions end"])
@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("leaf", LEAVES)
def test_it_has_its_gradient_in_each_step(leaf: str, look: str, flushes: bool) -> None:
    expected = gradients(leaf, look, contextlib.nullcontext(), flushes)
    with kitsune.config.patch(gate=False):
        assert gradients(leaf, look, kitsune.accelerate(device="cpu"), flushes) == expected


def multiplier(context: Any, kind: Any) -> tuple[list[Any], ...]:
    """A multiplier beside a model, made where the training is, and told of in each step."""
    torch.manual_seed(0)
    net, x, told = nn.Linear(3, 2), torch.randn(12, 4, 3), []
    with context:
        multiplier = torch.zeros(1, requires_grad=True)
        optimizers = [torch.optim.SGD(net.parameters(), 0.1, momentum=0.9), kind([multiplier], lr=0.1)]
        for k in range(12):
            out = net(x[k])
            loss = out.square().mean() + (F.softplus(multiplier) * (out.mean() - 0.1)).sum()
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            told.append((loss.detach(), multiplier.detach().clone()))
    return tuple([t.tolist() for t in step] for step in told)


@pytest.mark.parametrize("replayed", [False, True], ids=["", "replayed"])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.Rprop])
def test_an_optimizer_updates_what_was_made_in_the_context(kind: Any, replayed: bool) -> None:
    expected = multiplier(contextlib.nullcontext(), kind)
    with kitsune.config.patch(gate=False), graphs(kernels=False) if replayed else contextlib.nullcontext():
        assert multiplier(kitsune.accelerate(device="cpu"), kind) == expected
        assert kitsune.counters()["followed"] > 12


def kept_view(inside: bool, context: Any) -> list[Any]:
    """A view of a weight is kept from step to step, and looked at without gradients."""
    torch.manual_seed(0)
    x, found = torch.randn(8, 2, 3), []
    weight = nn.Parameter(torch.ones(4, 3))
    with context:
        w = torch.ones(4, 3, requires_grad=True) if inside else weight
        optimizer, t = torch.optim.SGD([w], 0.1), w.t()
        for k in range(8):
            loss = (x[k] @ t).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append((loss.detach(), t.detach().sum()))
    return [[t.item() for t in step] for step in found]


@pytest.mark.parametrize("inside", [False, True], ids=["of a weight", "of a leaf that was made there"])
def test_a_view_that_is_kept_sees_each_update(inside: bool) -> None:
    expected = kept_view(inside, contextlib.nullcontext())
    with kitsune.config.patch(gate=False):
        assert kept_view(inside, kitsune.accelerate(device="cpu")) == expected


MADE: dict[str, Callable[[], Tensor]] = {
    "fresh": lambda: torch.zeros(3),
    "written": lambda: torch.zeros(3).add_(1),
    "drawn": lambda: torch.empty(3).normal_().mul_(2),
    "of a view": lambda: torch.ones(4).add_(1)[1:],
    "of a weight": lambda: nn.Linear(3, 1).weight.t(),
}


def counted(make: Callable[[], Tensor], context: Any) -> list[int]:
    with context:
        p = nn.Parameter(make())
        counts = [p._version]
        with torch.no_grad():
            p.add_(1)
        return [*counts, p._version]


@pytest.mark.parametrize("name", MADE)
def test_a_parameter_has_been_written_as_often_as_what_it_is_made_of(name: str) -> None:
    expected = counted(MADE[name], contextlib.nullcontext())
    assert counted(MADE[name], kitsune.accelerate(device="cpu")) == expected
