"""Means over a count that grows: a whole number which is another one in each step makes no region of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import kitsune

STEPS = 14
pytestmark = pytest.mark.usefixtures("repeatable")


class Meter:
    """The AverageMeter of many examples."""

    def __init__(self) -> None:
        self.total: Any = 0
        self.count = 0

    def update(self, value: Any, n: int) -> None:
        self.total = self.total + value * n
        self.count += n
        self.mean = self.total / self.count


def trained(look: Callable[[Meter, Tensor, Tensor, Tensor], Any], tokens: bool = False) -> list[Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    y, meter, seen = torch.arange(8) % 3, Meter(), []
    for k, x in enumerate(torch.randn(STEPS, 8, 6).unbind()):
        optimizer.zero_grad()
        out = model(x)
        loss = cross_entropy(out, y, reduction="sum") / (k + 5 if tokens else 8)
        loss.backward()
        optimizer.step()
        found = look(meter, out, y, loss)
        seen.append((found, found.dtype))
    return [*((t.tolist(), dtype) for t, dtype in seen), *(p.tolist() for p in model.parameters())]


def mean_loss(meter: Meter, out: Tensor, y: Tensor, loss: Tensor) -> Tensor:
    meter.update(loss.detach(), 8)
    return meter.mean  # type: ignore[no-any-return]


def mean_loss_with_its_history(meter: Meter, out: Tensor, y: Tensor, loss: Tensor) -> Tensor:
    meter.update(loss, 8)
    return meter.mean  # type: ignore[no-any-return]


def accuracy(meter: Meter, out: Tensor, y: Tensor, loss: Tensor) -> Tensor:
    meter.count += len(y)
    meter.total = meter.total + (out.argmax(1) == y).sum()
    return meter.total / meter.count  # type: ignore[no-any-return]


def weighted(meter: Meter, out: Tensor, y: Tensor, loss: Tensor) -> Tensor:
    meter.count += 3
    return loss.detach() * meter.count


def half(meter: Meter, out: Tensor, y: Tensor, loss: Tensor) -> Tensor:
    meter.count += 40_001
    return out.detach().half().div(meter.count)


LOOKS = (mean_loss, mean_loss_with_its_history, accuracy, weighted, half)


@pytest.mark.parametrize("look", LOOKS)
def test_a_mean_over_a_growing_count_leaves_the_step_known(look: Any, kitsunes: Any) -> None:
    expected = trained(look)
    with kitsunes():
        assert trained(look) == expected
    counters = kitsune.counters()
    assert counters["backwards_followed"] >= STEPS - 6, kitsune.explain()


def test_a_loss_over_a_number_of_tokens(kitsunes: Any) -> None:
    expected = trained(mean_loss, tokens=True)
    with kitsunes():
        assert trained(mean_loss, tokens=True) == expected
    assert kitsune.counters()["backwards_followed"] >= STEPS - 6, kitsune.explain()


def test_whole_numbers_stay_whole_where_that_is_seen(kitsunes: Any) -> None:
    def products() -> list[Any]:
        found: list[Any] = []
        count, x = torch.arange(5), torch.linspace(0, 1, 5)
        for k in range(1, STEPS):
            found += [count * k, count * (2**60 + k), x / (2**60 + k), x.div(k, rounding_mode="floor"), x * bool(k % 2)]
            found += [x.to(torch.complex64) / k, x.double() / (2**53 - k), count.bool() / k]
            kitsune.flush()
        return [(t.tolist(), t.dtype) for t in found]

    expected = products()
    with kitsunes():
        assert products() == expected
    assert kitsune.counters()["recorded"] or kitsune.counters()["observed"]


def test_a_number_beyond_torchs_is_refused(kitsunes: Any) -> None:
    def words() -> list[str]:
        found = []
        for k in range(1, STEPS):
            x = torch.linspace(0, 1, 5) * k
            with pytest.raises(OverflowError) as error:
                x / (2**70 + k)
            found.append(str(error.value))
        return found

    expected = words()
    with kitsunes():
        assert words() == expected


def test_a_number_that_stays_the_same_is_part_of_what_is_known(kitsunes: Any) -> None:
    def halves() -> list[Any]:
        x, found = torch.linspace(0, 1, 5), []
        for _ in range(STEPS):
            found.append(x / 2)
            kitsune.flush()
        return [t.tolist() for t in found]

    expected = halves()
    with kitsunes():
        assert halves() == expected
    plan = kitsune.last_plan()
    assert plan is not None and [type(op.args[1]) for op in plan.graph.ops] == [int]
