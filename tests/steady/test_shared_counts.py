"""A Parameter, or whatever else is made of a wrapper, shares its count of writes: a backward is refused as in eager."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kitsune
from tests.runtime.repeated import graphs

pytestmark = pytest.mark.usefixtures("afresh")

STEPS = 9
WRITTEN = (0, 2, 5, 7)


class Marked(torch.Tensor):
    pass


def registered(t: Tensor) -> Any:
    module = nn.Module()
    module.register_parameter("p", nn.Parameter(t))
    return module.p


def tied(t: Tensor) -> Any:
    one, other = nn.Linear(3, 3), nn.Linear(3, 3)
    one.weight = nn.Parameter(t)
    other.weight = one.weight
    return other.weight


def torch_dispatch_off(t: Tensor) -> Any:
    with torch._C._DisableTorchDispatch():
        return nn.Parameter(t)


MAKE: dict[str, Callable[[Tensor], Any]] = {
    "a Parameter": nn.Parameter,
    "a frozen one": lambda t: nn.Parameter(t, requires_grad=False),
    "a buffer": lambda t: nn.Buffer(t).requires_grad_(),
    "_make_subclass": lambda t: torch.Tensor._make_subclass(nn.Parameter, t, True),
    "registered": registered,
    "tied": tied,
    "of a Parameter": lambda t: nn.Parameter(nn.Parameter(t)),
    "of a part": lambda t: nn.Parameter(t[:, :]),
    "of what is detached": lambda t: nn.Parameter(t.detach()),
    "what is detached": lambda t: t.detach().requires_grad_(),
    "of its data": lambda t: nn.Parameter(t.data),
    "a subclass": lambda t: t.as_subclass(Marked),
    "with dispatch off": torch_dispatch_off,
    "behind a read": lambda t: (t.sum().item(), torch.Tensor._make_subclass(nn.Parameter, t, True))[1],
    "in inference mode": torch.inference_mode()(lambda t: nn.Parameter(t)),
}
OF: dict[str, Callable[[Tensor], Tensor]] = {
    "pending": lambda w: torch.zeros(3, 3).add_(1),
    "computed": lambda w: (t := torch.zeros(3, 3).add_(1), t.tolist())[0],
    "a view": lambda w: torch.zeros(9).add_(1).view(3, 3),
    "graded": lambda w: (w * 2).add_(1),
    "a graded view": lambda w: (w * 2).t(),
    "a leaf": lambda w: torch.zeros(3, 3, requires_grad=True),
}
WRITE: dict[str, Callable[[Tensor, Any], Any]] = {
    "of the tensor": lambda t, p: t.add_(1),
    "of the other": lambda t, p: p.add_(1),
    "of both": lambda t, p: (t.mul_(2), p.add_(1)),
    "of both in a list": lambda t, p: torch._foreach_add_([t, p], 1),
    "of a view": lambda t, p: t[0].add_(1),
    "unseen by autograd": lambda t, p: t.data.add_(1),
}


class Training:
    """Tells of each step what a program sees, and what became of the weight."""

    # For the graph.
    asks = False

    def __init__(self, make: str, of: str, write: str) -> None:
        torch.manual_seed(0)
        self.make, self.of, self.write = MAKE[make], OF[of], WRITE[write]
        self.weight = nn.Parameter(torch.randn(3, 3))
        self.optimizer = torch.optim.SGD([self.weight], lr=0.01)
        self.told: list[Any] = []

    def step(self, k: int) -> None:
        t = self.of(self.weight)
        before = (t * self.weight).sum()
        p = self.make(t)
        loss = (p * p * self.weight).sum() + before
        if self.asks:
            self.told.append(type(loss.grad_fn).__name__)
        if k in (WRITTEN[2:] if self.asks else WRITTEN):
            with torch.no_grad():
                self.write(t, p)
        try:
            loss.backward()
        except RuntimeError as error:
            self.told.append(str(error)[:60])
        self.told.append((t._version, p._version, p.requires_grad))
        if p.is_leaf and p.grad is not None:
            self.told.append(p.grad.tolist())
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.told.append((t.tolist(), p.tolist()))

    def run(self, each: Callable[[], Any]) -> list[Any]:
        for k in range(STEPS):
            with each():
                self.step(k)
        return [*self.told, self.weight.tolist()]


def trained(way: str, *names: str) -> list[Any]:
    if way == "eager":
        return Training(*names).run(contextlib.nullcontext)
    recorded = graphs(kernels=False) if way == "replayed" else contextlib.nullcontext()
    accelerate = kitsune.accelerate(device="cpu", warmup=0 if way == "lazy at once" else 1)
    with kitsune.config.patch(gate=False), recorded:
        if way == "a context each":
            return Training(*names).run(lambda: accelerate)
        with accelerate:
            return Training(*names).run(contextlib.nullcontext)


WAYS = ["followed", "lazy at once", "a context each", "replayed"]


@pytest.mark.parametrize("write", list(WRITE))
@pytest.mark.parametrize("of", list(OF))
def test_a_parameter_shares_the_count_of_what_it_was_made_of(of: str, write: str) -> None:
    expected = trained("eager", "a Parameter", of, write)
    assert all(trained(way, "a Parameter", of, write) == expected for way in WAYS)


@pytest.mark.parametrize("write", ["of the tensor", "of the other", "of both in a list"])
@pytest.mark.parametrize("of", ["pending", "a view", "graded"])
@pytest.mark.parametrize("make", list(MAKE))
def test_so_does_whatever_is_made_of_it(make: str, of: str, write: str) -> None:
    expected = trained("eager", make, of, write)
    assert all(trained(way, make, of, write) == expected for way in WAYS)


@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize("make", ["what is detached", "of what is detached"])
@pytest.mark.parametrize("write", ["of the tensor", "of the other", "of both"])
def test_a_view_that_gets_its_place_later_is_counted_with_what_was_detached_from_it(
    write: str, make: str, asks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Training, "asks", asks)
    names = make, "a graded view", write
    assert trained("followed", *names) == trained("eager", *names)


@pytest.mark.parametrize("view", ["t", "unbind"])
def test_views_and_what_was_detached_from_them_have_one_count(view: str) -> None:
    def run() -> list[Any]:
        torch.manual_seed(0)
        weight, told = nn.Parameter(torch.randn(2, 2)), []
        for k in range(STEPS):
            views = (weight * 2).unbind(0) if view == "unbind" else ((weight * 2).t(),)
            first, last = views[0].detach().requires_grad_(), views[-1].detach()
            loss = (first * first * weight).sum() + sum((v * weight).sum() for v in views)
            told.append(type(loss.grad_fn).__name__)
            if k in WRITTEN[2:]:
                with torch.no_grad():
                    (last if view == "unbind" else views[0]).mul_(2)
                    last.add_(1)
            try:
                loss.backward()
            except RuntimeError as error:
                told.append(str(error)[:60])
            told.append([t._version for t in (*views, first, last)])
            weight.grad = None
        return told

    expected = run()
    with kitsune.config.patch(gate=False), kitsune.accelerate(device="cpu"):
        assert run() == expected


def test_the_count_stays_when_the_wrapper_is_gone() -> None:
    def run() -> list[Any]:
        weight, made = nn.Parameter(torch.ones(3)), []
        for _ in range(STEPS):
            t = (weight.detach() * 2).add_(1)
            made.append(torch.Tensor._make_subclass(nn.Parameter, t))
            t.add_(1)
            del t
            (weight * made[-1]).sum().backward()
            kitsune.flush()
        return [(p._version, p.tolist()) for p in made]

    expected = run()
    with kitsune.config.patch(gate=False), kitsune.accelerate(device="cpu"):
        assert run() == expected


def told_behind_a_context(each: Callable[[], Any], make: str, write: str) -> list[Any]:
    told: list[Any] = []
    for _ in range(3):
        with each():
            t = torch.zeros(3, 3).add_(1)
        p = MAKE[make](t).requires_grad_()
        loss = (p * p).sum()
        with torch.no_grad():
            WRITE[write](t, p)
        try:
            loss.backward()
            told.append(p.grad.tolist())
        except RuntimeError as error:
            told.append(str(error)[:60])
        told.append((t._version, p._version, t.tolist(), p.tolist()))
    return told


@pytest.mark.parametrize("write", list(WRITE))
@pytest.mark.parametrize("make", ["a Parameter", "_make_subclass", "a subclass"])
def test_it_does_outside_of_a_context(make: str, write: str) -> None:
    expected = told_behind_a_context(contextlib.nullcontext, make, write)
    assert told_behind_a_context(lambda: kitsune.accelerate(device="cpu"), make, write) == expected


def told_of_a_gradient(each: Callable[[], Any], holds: str) -> list[Any]:
    torch.manual_seed(0)
    layer, scale, x = nn.Linear(3, 3), nn.Parameter(torch.ones(3)), torch.randn(4, 3)
    told: list[Any] = []
    for _ in range(STEPS):
        with each():
            layer.zero_grad()
            layer(x).sum().backward()
            held = layer.weight.grad
            loss = (held * scale).sum()
        del held
        if holds == "autograd and the program":
            kept = layer.weight.grad
        layer.weight.grad.zero_()
        try:
            loss.backward()
            told.append(scale.grad.tolist())
        except RuntimeError as error:
            told.append(str(error)[:60])
        told.append((layer.weight.grad._version, kept._version if holds == "autograd and the program" else None))
    return told


@pytest.mark.parametrize("holds", ["autograd", "autograd and the program"])
def test_a_gradient_that_somebody_holds_shares_its_count_with_the_one_behind_the_context(holds: str) -> None:
    expected = told_of_a_gradient(contextlib.nullcontext, holds)
    assert "one of the variables needed for gradient" in expected[0]
    with kitsune.config.patch(gate=False):
        assert told_of_a_gradient(lambda: kitsune.accelerate(device="cpu"), holds) == expected
