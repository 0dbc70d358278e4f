"""Calls whose graph is owed when a region ends are not made again if nobody holds what they have made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import kitsune

STEPS = 12
pytestmark = pytest.mark.usefixtures("repeatable")


def accuracy(out: Tensor, y: Tensor) -> Tensor:
    _, best = out.max(1)
    return best.eq(y).sum() + (out.softmax(-1) > 0.5).any(1).sum()


def accuracy_of_data(out: Tensor, y: Tensor) -> Tensor:
    return (out.data.max(1)[1] == y).sum()


def trained(early: bool, metric: Callable[[Tensor, Tensor], Tensor]) -> list[Any]:
    """A metric within the step, before the backward or behind it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    y, right = torch.arange(8) % 3, torch.zeros(())
    for x in torch.randn(STEPS, 8, 6).unbind():
        optimizer.zero_grad()
        out = model(x)
        loss = cross_entropy(out, y)
        if early:
            right = right + metric(out, y)
        loss.backward()
        if not early:
            right = right + metric(out, y)
        optimizer.step()
    return [right.tolist(), *(p.tolist() for p in model.parameters()), *(p._version for p in model.parameters())]


@pytest.mark.parametrize("metric", [accuracy, accuracy_of_data])
@pytest.mark.parametrize("early", [True, False])
def test_a_metric_within_the_step_is_not_made_again(early: bool, metric: Any, kitsunes: Any) -> None:
    expected = trained(early, metric)
    with kitsunes():
        assert trained(early, metric) == expected
    counters = kitsune.counters()
    assert counters["backwards_followed"] >= STEPS - 3, kitsune.explain()
    assert counters["realized"] == 0


def kept(keep: Callable[[Tensor, Tensor, Tensor], Any]) -> list[Any]:
    """Of three results, each made of the one before, `keep` keeps something; what can be gone backward through is told."""
    torch.manual_seed(0)
    weight, found = nn.Parameter(torch.randn(4)), list[Any]()
    optimizer = torch.optim.SGD([weight], lr=0.1)
    for x in torch.randn(STEPS, 4).unbind():
        optimizer.zero_grad()
        (weight * x).square().sum().backward()
        first = weight * weight
        second = first.exp()
        third = second * x
        held = keep(first, second, third)
        del first, second, third
        optimizer.step()
        found += [held() is None] if callable(held) else held
    # What a graph has saved may have been written by then.
    return [what if type(what) is bool else (what.requires_grad, what.tolist(), grad_of(what, weight)) for what in found]


def grad_of(tensor: Tensor, weight: Tensor) -> Any:
    try:
        return torch.autograd.grad(tensor.sum(), weight, retain_graph=True)[0].tolist()
    except RuntimeError as error:
        return str(error).partition(":")[0]


KEEPS: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "nothing": lambda first, second, third: [],
    "the first": lambda first, second, third: [first],
    "the second": lambda first, second, third: [second],
    "the last": lambda first, second, third: [third],
    "the first and the last": lambda first, second, third: [first, third],
    "what is detached": lambda first, second, third: [third.detach()],
    "a view": lambda first, second, third: [second[1:]],
    "one that it knows weakly": lambda first, second, third: ref(second),
}


WRITES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "what a backward saved": lambda hidden, loss: hidden.data.mul_(0.5),
    "part of it": lambda hidden, loss: hidden.data[:, 0].add_(1.0),
    "the loss": lambda hidden, loss: loss.data.mul_(2.0),
    "a leaf of its own": lambda hidden, loss: (hidden.data.requires_grad_() * 2).sum().backward(),
}


@pytest.mark.parametrize("name", list(WRITES))
def test_data_is_written_behind_autograds_back(name: str, kitsunes: Any) -> None:
    def grads() -> list[Any]:
        torch.manual_seed(0)
        first, last, found = nn.Linear(6, 8), nn.Linear(8, 3), list[Any]()
        for x in torch.randn(STEPS, 4, 6).unbind():
            first.zero_grad()
            hidden = first(x).tanh()
            loss = last(hidden).square().mean()
            WRITES[name](hidden, loss)
            loss.backward()
            assert first.weight.grad is not None
            found.append((first.weight.grad.tolist(), loss.tolist(), hidden.tolist(), hidden._version))
        return found

    expected = grads()
    with kitsunes():
        assert grads() == expected


@pytest.mark.parametrize("name", list(KEEPS))
def test_what_somebody_holds_has_its_graph(name: str, kitsunes: Any) -> None:
    expected = kept(KEEPS[name])
    with kitsunes():
        assert kept(KEEPS[name]) == expected
    assert kitsune.counters()["followed"]


def test_what_has_an_attribute_has_its_graph(kitsunes: Any) -> None:
    """It may be held by what it holds itself."""

    def grads() -> list[Any]:
        torch.manual_seed(0)
        weight, found = nn.Parameter(torch.randn(4)), list[Any]()
        for x in torch.randn(STEPS, 4).unbind():
            result: Any = (weight * x).exp()
            result.itself = result
            known = ref(result)
            del result
            kitsune.flush()
            again: Any = known()
            found.append(torch.autograd.grad(again.sum(), weight)[0].tolist())
            del again.itself
        return found

    expected = grads()
    with kitsunes():
        assert grads() == expected
