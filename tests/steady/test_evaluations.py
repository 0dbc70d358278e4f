"""An evaluation between training steps is followed as the steps are: nothing is learned anew when a model changes its mode."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kitsune
from kitsune.lazy import call_lane
from kitsune.lazy.call_lane import CallLane

NODES, EDGES, FEATURES, CLASSES = 30, 90, 8, 4
# Steps until all is known, and those that are looked at.
LEARNING, STEADY = 18, 6
pytestmark = pytest.mark.usefixtures("repeatable")
EDGE_INDEX = torch.arange(2 * EDGES).view(2, EDGES) * 7 % NODES
X, Y = torch.arange(NODES * FEATURES).view(NODES, FEATURES) % 11 / 11, torch.arange(NODES) % CLASSES
TRAIN = torch.arange(NODES) % 3 == 0
VAL = ~TRAIN


@pytest.fixture(params=[0, 1], ids=["warmup=0", "warmup=1"])
def kitsunes(request: pytest.FixtureRequest) -> Any:
    kitsune.reset()
    return lambda: kitsune.accelerate(device="cpu", warmup=request.param)


class Conv(nn.Module):
    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.linear, self.bias = nn.Linear(n_in, n_out, bias=False), nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        row, col = edges[0], edges[1]
        degree = x.new_zeros(NODES).scatter_add_(0, col, torch.ones_like(col, dtype=x.dtype))
        weight = (degree + 1).pow(-0.5)
        x = self.linear(x)
        messages = x[row] * (weight[row] * weight[col]).view(-1, 1)
        return x.new_zeros(NODES, x.shape[1]).scatter_add_(0, col.view(-1, 1).expand_as(messages), messages) + self.bias


class Convs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Conv(FEATURES, 6), Conv(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(F.relu(self.first(x, EDGE_INDEX)), 0.5, self.training)
        result: Tensor = self.second(h, EDGE_INDEX)
        return result


def accuracy(model: nn.Module) -> Tensor:
    return (model(X)[VAL].argmax(1) == Y[VAL]).float().mean()


def in_a_block(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return accuracy(model)


def for_inference(model: nn.Module) -> Tensor:
    with torch.inference_mode():
        return accuracy(model)


def as_a_number(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return torch.full((), accuracy(model).item())


EVALUATIONS: dict[str, tuple[Callable[[nn.Module], Tensor], int]] = {
    "no_grad": (in_a_block, 1),
    "a function under no_grad": (torch.no_grad()(accuracy), 1),
    "inference_mode": (for_inference, 1),
    "read": (as_a_number, 1),
    "every third step": (in_a_block, 3),
}


class Trained:
    def __init__(self, evaluate: Callable[[nn.Module], Tensor], every: int) -> None:
        torch.manual_seed(0)
        self.model = Convs()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01, foreach=True)
        self.evaluate, self.every, self.seen = evaluate, every, list[Tensor]()

    def run(self, n: int) -> Trained:
        for k in range(n):
            self.model.train()
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.model(X)[TRAIN], Y[TRAIN])
            loss.backward()
            self.optimizer.step()
            self.seen.append(loss.detach())
            if k % self.every == self.every - 1:
                self.model.eval()
                self.seen.append(self.evaluate(self.model))
        return self

    def values(self) -> list[Any]:
        return [t.tolist() for t in (*self.seen, *self.model.parameters())]


@pytest.mark.parametrize("name", EVALUATIONS)
def test_an_evaluation_between_steps_is_followed(name: str, kitsunes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    learned, slow = list[str](), Counter[str]()
    learn, key_of = CallLane.learn, call_lane.key_of

    def heard(lane: Any, key: Any, func: Any, kwargs: Any, sight: Any) -> Any:
        learned.append(func.__name__)
        return learn(lane, key, func, kwargs, sight)

    def asked(region: Any, func: Any, *rest: Any) -> Any:
        slow[func.__name__] += 1
        return key_of(region, func, *rest)

    evaluate, every = EVALUATIONS[name]
    expected = Trained(evaluate, every).run(LEARNING + STEADY).values()
    with kitsune.config.patch(gate=False), kitsunes():
        trained = Trained(evaluate, every).run(LEARNING)
        monkeypatch.setattr(CallLane, "learn", heard)
        monkeypatch.setattr(call_lane, "key_of", asked)
        before = kitsune.counters()
        half = trained.run(STEADY // 2) and kitsune.counters()
        after = trained.run(STEADY // 2) and kitsune.counters()
        monkeypatch.undo()
        assert trained.values() == expected
    # A loss whose graph is used up is detached by torch.
    assert not learned and {*slow} <= {"detach"} and slow.total() <= STEADY, (learned, slow)
    assert after["regions"] == before["regions"] and after["realized"] == before["realized"], kitsune.explain()
    assert after["backwards_followed"] == before["backwards_followed"] + STEADY
    assert half["followed"] - before["followed"] == after["followed"] - half["followed"] > 0
    # Torch counts each mask on the host, once for outputs and targets.
    counted = {line.op: line.count for line in kitsune.explain().passed_through}["aten.nonzero.default"]
    n = LEARNING + STEADY
    assert counted <= n + n // every + 4, counted


OTHER = torch.arange(8) % 2 == 0


def by_a_view(mask: Tensor) -> None:
    mask[2:5] = False


def other_memory(mask: Tensor) -> None:
    mask.data = OTHER.clone()


def by_numpy(mask: Tensor) -> None:
    mask.numpy()[:] = OTHER.numpy()


CHANGES: tuple[Callable[[Tensor], Any], ...] = (
    Tensor.logical_not_,
    lambda mask: mask.data.copy_(OTHER),
    by_a_view,
    other_memory,
    lambda mask: mask.map_(OTHER, lambda one, two: one != two),
    lambda mask: mask.apply_(lambda one: not one),
    by_numpy,
)


def test_a_mask_that_changes_between_two_reads_is_counted_again(kitsunes: Any) -> None:
    def steps() -> list[Any]:
        found = list[Any]()
        for change in CHANGES:
            with kitsune.disable():
                mask = torch.arange(8) < 3
            for _ in range(4):
                x = torch.arange(8.0) * 2
                first = (x * 3)[mask]
                change(mask)
                found += [first.tolist(), (x * 5)[mask].tolist(), x[mask].tolist()]
                first = (x * 3)[mask]
                change(mask)
                second = (x * 5)[mask]
                found += [first.tolist(), second.tolist()]
        return found

    expected = steps()
    with kitsune.config.patch(gate=False), kitsunes():
        assert steps() == expected


def test_a_mask_that_was_counted_for_inference_is_counted_again_for_a_backward(kitsunes: Any) -> None:
    def steps() -> list[Any]:
        found, mask = list[Any](), torch.arange(8) % 3 == 0
        weight = torch.ones(8, requires_grad=True)
        for _ in range(6):
            with torch.inference_mode():
                metric = (torch.arange(8.0) * 3)[mask] + 0
            (weight.exp() * 2)[mask].sum().backward()
            with torch.inference_mode():
                again = (torch.arange(8.0) * 5)[mask] + 0
            found += [metric.tolist(), again.tolist(), weight.grad.tolist()]  # type: ignore[union-attr]
        return found

    expected = steps()
    with kitsune.config.patch(gate=False), kitsunes():
        assert steps() == expected


def test_a_mask_in_memory_of_numpys_is_counted_each_time(kitsunes: Any) -> None:
    def steps() -> list[Any]:
        found = list[Any]()
        for _ in range(4):
            with kitsune.disable():
                memory = (torch.arange(8) < 3).numpy()
            mask, x = torch.from_numpy(memory), torch.arange(8.0) * 2
            first = x[mask]
            memory[5:] = True
            found += [first.tolist(), x[mask].tolist()]
        return found

    expected = steps()
    with kitsune.config.patch(gate=False), kitsunes():
        assert steps() == expected


def test_what_does_nothing_gives_back_what_it_was_given(kitsunes: Any) -> None:
    def steps() -> list[Any]:
        found = list[Any]()
        for p in (0.5, 0.5, 0.5, 0.25, 0.5, 0.25):
            h = torch.arange(12.0).view(3, 4) * 2
            same = [F.dropout(h, p, False), h.contiguous(), h.float(), F.dropout(h, p, True), h.t().contiguous(), h.double()]
            found += [[t is h for t in same], same[0].add_(1).tolist(), h.tolist(), h._version]
        return found

    torch.manual_seed(0)
    expected = steps()
    torch.manual_seed(0)
    with kitsune.config.patch(gate=False), kitsunes():
        assert steps() == expected


def test_views_that_share_memory_are_told_from_others(kitsunes: Any) -> None:
    """Each comes in as another tensor every time; where they lie to each other is part of what they are known by."""
    memory = torch.arange(24)

    def steps() -> list[Any]:
        found = list[Any]()
        for k in (0, 0, 0, 0, 2, 0, 2, 2, 5):
            x = torch.arange(40.0) * 2
            first, second = memory[:4], memory[4 + k : 8 + k]
            third = torch.arange(4) + 1 if k == 5 else memory[1:5]
            found.append((x[first] * x[second] + x[third]).tolist())
        return found

    expected = steps()
    with kitsune.config.patch(gate=False), kitsunes():
        for _ in range(3):
            assert steps() == expected
