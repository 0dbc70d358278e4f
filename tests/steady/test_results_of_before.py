"""Results of a region that come into the next one, in calls that are known by heart: gradients that are clipped after a read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import kitsune
from kitsune.lazy import matcher_steps

STEPS, AT = 9, 7
pytestmark = pytest.mark.usefixtures("repeatable")
LEAF = torch.full((4, 4), 2.0, requires_grad=True)
# Of the step that is going on: a product that autograd knows nothing of once it is followed, and what NumPy shares.
HELD: dict[str, Any] = {}
Change = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def needs_a_gradient(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return a, b.detach().requires_grad_()


def owes_a_history(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return a, HELD["product"]


def shared_with_numpy(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Which writes it once it has been read."""
    HELD["array"] = b.numpy()
    return a, b


def written_from_outside(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    b.data.mul_(3)
    return a, b


CHANGES: dict[str, Change] = {
    "nothing": lambda a, b: (a, b),
    "swapped": lambda a, b: (b, a),
    "the same twice": lambda a, b: (a, a),
    "its own view": lambda a, b: (a, a.t()),
    "one memory": lambda a, b: (a, a.view(16).view(4, 4)),
    "a row of it": lambda a, b: (a, a[0]),
    "another type": lambda a, b: (a, b.double()),
    "another shape": lambda a, b: (a, b[:1].clone()),
    "other strides": lambda a, b: (a, b.t().contiguous().t()),
    "behind an offset": lambda a, b: (a, torch.cat([a, b])[4:]),
    "plain": lambda a, b: (a, torch.full((4, 4), 3.0)),
    "needs a gradient": needs_a_gradient,
    "owes a history": owes_a_history,
    "shared with numpy": shared_with_numpy,
    "written from outside": written_from_outside,
}


def run(change: Change, where: str) -> list[Any]:
    """What each step gives: a region that ends with a read, and one that begins with another op and takes its results."""
    torch.manual_seed(0)
    HELD.clear()
    found: list[Any] = []
    for at, x in enumerate(torch.randn(STEPS, 4, 4).unbind()):
        x = x.clone()
        a, b = x * 2, x + 1
        HELD["product"] = b * LEAF
        if where == "made so" and at == AT:
            a, b = change(a, b)
        # Not of what they are: the calls behind the read are the same.
        if torch.isnan((x * 3).sum()):
            break
        if where == "at the beginning" and at == AT:
            a, b = change(a, b)
        c = x.neg()
        if where == "later" and at == AT:
            a, b = change(a, b)
        out = torch.sub(a, b)
        if (array := HELD.pop("array", None)) is not None:
            array += 1
        a.mul_(0.5)
        last = out + c * a
        found.append([(t.tolist(), t.dtype, t.stride(), t._version, t.requires_grad) for t in (a, b, c, out, last)])
    return found


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Whether a result of before was known by heart, each time that it was looked at."""
    looks: list[bool] = []
    original: Any = matcher_steps._ALWAYS["serial_of_result"]

    def look(*of: Any) -> Any:
        serial = original(*of)
        looks.append(serial is not None)
        return serial

    monkeypatch.setitem(matcher_steps._ALWAYS, "serial_of_result", look)
    matcher_steps._maker.cache_clear()
    yield looks
    matcher_steps._maker.cache_clear()


@pytest.mark.parametrize("where", ["made so", "at the beginning", "later"])
@pytest.mark.parametrize("name", list(CHANGES))
def test_results_of_before_are_what_they_are(name: str, where: str, known: list[bool]) -> None:
    expected = run(CHANGES[name], where)
    with kitsune.config.patch(gate=False), kitsune.accelerate(device="cpu", warmup=0):
        assert run(CHANGES[name], where) == expected
    assert known.count(True) >= 2 * (STEPS - 5)


def test_one_that_the_region_knows_already_is_left_to_its_key(known: list[bool]) -> None:
    def steps(at: int) -> list[list[float]]:
        found = []
        for k in range(STEPS):
            x = torch.full((4,), float(k))
            a = x * 2
            if torch.isnan(a.sum()):
                break
            c = (a if k == at else x).neg()
            d = a + 1
            a.mul_(3)
            found.append([t.tolist() for t in (a, c, d, d - a)])
        return found

    expected = steps(AT)
    with kitsune.config.patch(gate=False), kitsune.accelerate(device="cpu", warmup=0):
        assert steps(AT) == expected
    assert any(known)


def test_a_call_that_is_made_again_has_what_it_had(known: list[bool]) -> None:
    """Its first operand is a result of before, which it has written since."""

    def steps() -> list[Any]:
        torch.manual_seed(1)
        w, found = torch.ones(4, requires_grad=True), []
        for k in range(STEPS):
            a = torch.full((4,), float(k)) * 2
            if torch.isnan(a.sum()):
                break
            b = torch.arange(4.0).neg()
            a.mul_(3)
            out = (a * w).sum() + b.sum()
            if k == AT:
                assert out.grad_fn is not None
            out.backward()
            found.append((out.tolist(), None if w.grad is None else w.grad.tolist(), a.tolist(), a._version))
        return found

    expected = steps()
    with kitsune.config.patch(gate=False), kitsune.accelerate(device="cpu", warmup=0):
        assert steps() == expected
    assert any(known)
