"""Leaves that a program makes inside of a context, before a region's end or behind it: their gradients are eager's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kitsune

STEPS = 7
pytestmark = pytest.mark.usefixtures("repeatable")


def by_flag() -> Tensor:
    leaf = torch.zeros(4)
    leaf.requires_grad = True
    return leaf


MAKERS: dict[str, Callable[[], Tensor]] = {
    "a factory": lambda: torch.ones(4, requires_grad=True),
    "a method": lambda: (torch.arange(4.0) + 1).requires_grad_(),
    "a flag": by_flag,
    "random": lambda: torch.rand(4).sub_(0.5).requires_grad_(),
    "a list": lambda: torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True),
    "a parameter": lambda: nn.Parameter(torch.ones(4)),
    "like another": lambda: torch.zeros_like(torch.ones(4), requires_grad=True),
    "detached": lambda: (torch.ones(4) * 3).detach().requires_grad_(),
}


def accumulated(leaf: Tensor, reads: bool) -> list[Any]:
    """What gradients are while they are added up, and after one was dropped."""
    found: list[Any] = []
    for k in range(STEPS):
        a = (torch.ones(4) * k) * 2
        if reads:
            a.sum().item()
        (a * leaf).sum().backward()
        found.append(None if leaf.grad is None else leaf.grad.tolist())
        if k == 4:
            leaf.grad = None
    return found


def attacked(leaf: Tensor, reads: bool) -> list[Any]:
    """Projected gradient steps on what is added to a batch."""
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    x, found = torch.randn(3, 4), []
    for _ in range(STEPS):
        loss = net(x + leaf).square().sum()
        loss.backward()
        if reads:
            found.append(loss.item())
        assert leaf.grad is not None
        with torch.no_grad():
            leaf += 0.1 * leaf.grad.sign()
            leaf.clamp_(-2, 2)
        leaf.grad.zero_()
    return [*found, leaf.tolist(), [p.grad.tolist() for p in net.parameters() if p.grad is not None]]


def trained(leaf: Tensor, reads: bool) -> list[Any]:
    optimizer = torch.optim.Adam([leaf], lr=0.1, foreach=True)
    found: list[Any] = []
    for k in range(STEPS):
        optimizer.zero_grad()
        loss = (leaf * (k + 1)).square().sum()
        if reads:
            found.append(loss.item())
        loss.backward()
        optimizer.step()
    return [*found, leaf.tolist()]


@pytest.mark.parametrize("reads", [True, False], ids=["read", "unread"])
@pytest.mark.parametrize("program", [accumulated, attacked, trained])
@pytest.mark.parametrize("name", list(MAKERS))
def test_a_leaf_made_inside_gets_its_gradients(name: str, program: Callable[[Tensor, bool], list[Any]], reads: bool) -> None:
    def run() -> list[Any]:
        torch.manual_seed(0)
        return program(MAKERS[name](), reads)

    expected = run()
    with kitsune.config.patch(gate=False), kitsune.accelerate(device="cpu", warmup=0):
        assert run() == expected
        assert run() == expected
    assert kitsune.counters()["recorded"]


def test_a_new_leaf_in_each_step_gets_its_gradient() -> None:
    """For a gradient penalty: the leaf is of the region before, since a number was read in between."""

    def run() -> list[Any]:
        torch.manual_seed(0)
        net, found = nn.Linear(4, 1), []
        for _ in range(STEPS):
            x = torch.randn(3, 4).mul(2).requires_grad_()
            found.append(x.detach().sum().item())
            net(x).sum().backward()
            found += [None if t.grad is None else t.grad.tolist() for t in (x, *net.parameters())]
        return found

    expected = run()
    with kitsune.config.patch(gate=False), kitsune.accelerate(device="cpu", warmup=0):
        assert run() == expected
