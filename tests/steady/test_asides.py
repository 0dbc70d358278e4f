"""What is made of the last step's results with their history leaves this step followed, and is what it is in eager."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax

import kitsune

STEPS = 12
pytestmark = pytest.mark.usefixtures("repeatable")
Look = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@pytest.fixture(params=[0, 1], ids=["warmup=0", "warmup=1"])
def kitsunes(request: pytest.FixtureRequest) -> Iterator[Any]:
    kitsune.reset()
    with kitsune.config.patch(gate=False):
        yield lambda: kitsune.accelerate(device="cpu", warmup=request.param)


def summed(total: Tensor, out: Tensor, y: Tensor, loss: Tensor) -> Tensor:
    total += loss
    return total


def of_the_best_five(total: Tensor, out: Tensor, y: Tensor, loss: Tensor) -> Tensor:
    _, best = out.topk(2, 1, True, True)
    best = best.t()
    return total + best.eq(y.view(1, -1).expand_as(best))[:1].reshape(-1).float().sum(0)


# A metric behind `optimizer.step()`, and whether it has a history at the end.
METRICS: dict[str, tuple[Look, bool]] = {
    "the largest": (lambda total, out, y, loss: total + out.max(1)[1].eq(y).sum(), False),
    "softmax": (lambda total, out, y, loss: total + (out.softmax(-1).argmax(1) == y).float().mean(), False),
    "data": (lambda total, out, y, loss: total + (out.data.max(1)[1] == y).sum(), False),
    "of the best five": (of_the_best_five, False),
    "entropy": (lambda total, out, y, loss: total - (log_softmax(out, 1).exp() * log_softmax(out, 1)).sum().detach(), False),
    "a sum of losses": (lambda total, out, y, loss: total + loss, True),
    "summed in place": (summed, True),
    "a running mean": (lambda total, out, y, loss: 0.9 * total + 0.1 * loss, True),
    "perplexity": (lambda total, out, y, loss: torch.exp(loss), True),
}


def trained(look: Look, accumulate: int = 1) -> list[Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    y, total = torch.arange(8) % 3, torch.zeros(())
    for k, x in enumerate(torch.randn(STEPS, 8, 6).unbind()):
        out = model(x)
        loss = cross_entropy(out, y)
        loss.backward()
        if k % accumulate == accumulate - 1:
            optimizer.step()
            optimizer.zero_grad()
        total = look(total, out, y, loss)
    return [total.tolist(), total.requires_grad, total._version, *(p.tolist() for p in model.parameters())]


@pytest.mark.parametrize("name", list(METRICS))
def test_a_metric_with_a_history_leaves_the_next_backward_followed(name: str, kitsunes: Any) -> None:
    look, graded = METRICS[name]
    expected = trained(look)
    assert expected[1] is graded
    with kitsunes():
        assert trained(look) == expected
    counters = kitsune.counters()
    assert counters["backwards_followed"] >= STEPS - 4, kitsune.explain()
    assert counters["updates_followed"] >= STEPS - 4
    assert counters["realized"] == 0


@pytest.mark.parametrize("name", ["the largest", "softmax", "data", "a sum of losses"])
def test_behind_a_backward_whose_gradients_are_summed_up(name: str, kitsunes: Any) -> None:
    look, _ = METRICS[name]
    expected = trained(look, 2)
    with kitsunes():
        assert trained(look, 2) == expected
    assert kitsune.counters()["backwards_followed"] >= STEPS - 6, kitsune.explain()


def test_it_can_still_be_gone_backward_through(kitsunes: Any) -> None:
    """The graph of the last step was kept, and what was made of it is added to this step's loss, or has a backward of its own."""

    def grads(joint: bool) -> list[Any]:
        torch.manual_seed(0)
        model = nn.Linear(5, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        found: list[Any] = []
        former = model(torch.randn(4, 5)).tanh()
        for x in torch.randn(STEPS, 4, 5).unbind():
            score = former.softmax(1).square().sum()
            score.register_hook(lambda grad: grad * 3)
            optimizer.zero_grad(set_to_none=False)
            out = model(x)
            loss = out.square().mean() + model(x + 1).exp().mean()
            if joint:
                (loss + score).backward(retain_graph=True)
            else:
                loss.backward(retain_graph=True)
                score.backward()
            found.append([p.grad.tolist() for p in model.parameters() if p.grad is not None])
            # Written in place, a weight that a graph saved would refuse its backward.
            former = model(x).tanh()
            kitsune.flush()
        return found

    for joint in (False, True):
        expected = grads(joint)
        with kitsunes():
            assert grads(joint) == expected


def test_a_followed_backward_comes_between_a_kept_graph_and_its_own(kitsunes: Any) -> None:
    def grads() -> list[Any]:
        torch.manual_seed(0)
        model, other = nn.Linear(5, 3), nn.Linear(5, 1)
        optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
        former, found = model(torch.randn(4, 5)).tanh(), list[Any]()
        for x in torch.randn(STEPS, 4, 5).unbind():
            score = former.softmax(1).square().sum()
            optimizer.zero_grad()
            other(x).square().mean().backward()
            optimizer.step()
            found.append([p.tolist() for p in other.parameters()])
            found.append([g.tolist() for g in torch.autograd.grad(score, model.parameters(), retain_graph=True)])
        return found

    expected = grads()
    with kitsunes():
        assert grads() == expected
    assert kitsune.counters()["backwards_followed"] >= STEPS - 4, kitsune.explain()


def test_hooks_come_in_eagers_order(kitsunes: Any) -> None:
    """What is made of the last step's results in the midst of this one comes behind what this one has made by then."""

    def heard() -> list[Any]:
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(6))
        former, found = weight.exp(), list[Any]()
        for x in torch.randn(STEPS, 2, 6).unbind():
            weight.grad = None
            first = (weight * x[0]).sin()
            score = former * x[1]
            loss = first.sum() + score.sum()
            first.register_hook(lambda _: found.append("first"))
            score.register_hook(lambda _: found.append("score"))
            loss.backward()
            assert weight.grad is not None
            found.append(weight.grad.tolist())
            former = weight.exp()
            kitsune.flush()
        return found

    expected = heard()
    with kitsunes():
        assert heard() == expected


def test_what_was_used_up_says_so_behind_a_metric(kitsunes: Any) -> None:
    def told() -> list[str]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        found, y = list[str](), torch.arange(8) % 3
        for x in torch.randn(STEPS, 8, 6).unbind():
            optimizer.zero_grad()
            out = model(x)
            cross_entropy(out, y).backward()
            optimizer.step()
            with pytest.raises(RuntimeError) as error:
                out.softmax(1).square().sum().backward()
            found.append(str(error.value))
        return found

    expected = told()
    with kitsunes():
        assert told() == expected
