"""What is detached from a view that a followed call made is written: a backward that needs the view is refused, as in eager."""

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
WRITTEN = (5, 7)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "a view": lambda y: y.view(-1),
    "a view of a view": lambda y: y.t()[1:],
    "one of many": lambda y: y.unbind(0)[1],
    "a part": lambda y: y.split(2, 1)[1],
    "a copy, reshaped": lambda y: y.t().reshape(-1),
    "an unsafe part": lambda y: torch.unsafe_split(y, 2, 1)[1],
    "no view": lambda y: y * 2,
}
ALIASES: dict[str, Callable[[Tensor], Tensor]] = {
    "detached": lambda h: h.detach(),
    "detached twice": lambda h: h.detach()[..., 1:].detach(),
    "without gradients": torch.no_grad()(lambda h: h[1:]),
}
ASKED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "nothing": lambda loss, alias: None,
    "the loss": lambda loss, alias: loss.item(),
    "the alias": lambda loss, alias: alias.sum().tolist(),
    "the graph": lambda loss, alias: type(loss.grad_fn).__name__,
}


class Training:
    """Tells of each step what a program sees, and what became of the weight."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)
        self.optimizer = torch.optim.SGD(self.layer.parameters(), lr=0.1)
        self.xs = torch.randn(STEPS, 4, 4)
        self.told: list[Any] = []

    def step(self, k: int, forward: Callable[[Tensor, bool], Tensor]) -> None:
        try:
            forward(self.layer(self.xs[k]) + 1, k in WRITTEN).backward()
        except RuntimeError as error:
            self.told.append(str(error)[:60])
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.told.append(self.layer.weight.detach().clone())


def told_by(forward: Callable[[Training, Tensor, bool], Tensor], context: Any) -> list[Any]:
    training = Training()
    with context:
        for k in range(STEPS):
            training.step(k, lambda y, written: forward(training, y, written))
    return [t.tolist() if isinstance(t, Tensor) else t for t in training.told]


def with_graphs() -> Any:
    stack = contextlib.ExitStack()
    stack.enter_context(graphs(kernels=False))
    stack.enter_context(kitsune.accelerate(device="cpu"))
    return stack


@pytest.mark.parametrize("always", [False, True], ids=["now and then", "in each step"])
@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("alias", ALIASES)
@pytest.mark.parametrize("view", VIEWS)
def test_a_write_to_what_was_detached_is_told_to_the_backward(view: str, alias: str, asked: str, always: bool) -> None:
    def forward(training: Training, y: Tensor, written: bool) -> Tensor:
        h = VIEWS[view](y)
        aliased = ALIASES[alias](h)
        loss = (h * h).sum() + (y * y).mean()
        training.told.append(ASKED[asked](loss, aliased))
        if written or always:
            with torch.no_grad():
                aliased.add_(1)
        return loss

    expected = told_by(forward, contextlib.nullcontext())
    assert sum(str(told).startswith("one of the variables needed") for told in expected) == (STEPS if always else len(WRITTEN))
    assert told_by(forward, kitsune.accelerate(device="cpu")) == expected
    assert kitsune.counters()["followed"] >= STEPS
    kitsune.reset()
    assert told_by(forward, with_graphs()) == expected


@pytest.mark.parametrize("always", [False, True], ids=["now and then", "in each step"])
@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("view", VIEWS)
def test_what_is_saved_behind_the_write_may_go_backward(view: str, asked: str, always: bool) -> None:
    def forward(training: Training, y: Tensor, written: bool) -> Tensor:
        h = VIEWS[view](y)
        aliased = h.detach()
        total = h.sum()
        training.told.append(ASKED[asked](total, aliased))
        if written or always:
            aliased.mul_(3)
        loss = total + (h * h).sum()
        if written:
            training.told.append((h._version, aliased._version))
        return loss

    expected = told_by(forward, contextlib.nullcontext())
    assert not any("modified" in str(told) for told in expected)
    assert told_by(forward, kitsune.accelerate(device="cpu")) == expected


@pytest.mark.parametrize("first", [False, True], ids=["saved before", "saved behind"])
@pytest.mark.parametrize("view", VIEWS)
def test_a_write_in_the_next_region_counts_once(view: str, first: bool) -> None:
    """Also beside calls that are owed, where one that is new in each step is made for real."""
    other, x = nn.Linear(4, 4), torch.ones(4, 4)

    def forward(training: Training, y: Tensor, written: bool) -> Tensor:
        h = VIEWS[view](y)
        aliased = h.detach()
        training.told.append(type(h.grad_fn).__name__)
        kitsune.flush()
        loss = 0 if first else (h * h).sum()
        beside = other(x).sum()
        aliased.add_(1)
        torch.full((len(training.told),), 2.0)
        if first:
            loss = (h * 2).sum()
            training.told.append((h._version, aliased._version))
        return loss + beside

    expected = told_by(forward, contextlib.nullcontext())
    refused = sum(str(told).startswith(("one of the variables needed", "Output 1 of")) for told in expected)
    assert refused == (0 if first and view not in ("one of many", "a part") else STEPS)
    assert told_by(forward, kitsune.accelerate(device="cpu")) == expected


@pytest.mark.parametrize("view", VIEWS)
def test_a_write_just_before_calls_are_made_again_is_not_lost(view: str) -> None:
    other, x = nn.Linear(4, 4), torch.ones(4, 4)

    def forward(training: Training, y: Tensor, written: bool) -> Tensor:
        h = VIEWS[view](y)
        aliased = h.detach()
        loss = (h * h).sum()
        training.told.append(type(loss.grad_fn).__name__)
        if written:
            aliased.add_(1)
        kitsune.flush()
        # Owed when the backward comes.
        other(x).sum()
        return loss

    expected = told_by(forward, contextlib.nullcontext())
    refused = sum(str(told).startswith(("one of the variables needed", "Output 1 of")) for told in expected)
    assert refused == len(WRITTEN)
    assert told_by(forward, kitsune.accelerate(device="cpu")) == expected


def with_no_gradients(alias: Tensor) -> None:
    with torch.no_grad():
        alias.add_(1)


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "added to": lambda alias: alias.add_(1),
    "zeroed": lambda alias: alias.zero_(),
    "indexed": lambda alias: alias.__setitem__(0, 1),
    "many": lambda alias: torch._foreach_add_([alias], 1),
    "as out": lambda alias: torch.add(alias, 1, out=alias),
    "a view of it": lambda alias: torch.no_grad()(lambda: alias[:1])().add_(1),
    "with no gradients": with_no_gradients,
    "nothing": lambda alias: None,
}


@pytest.mark.parametrize("behind", [False, True], ids=["", "behind the backward"])
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("view", VIEWS)
def test_a_view_that_was_taken_without_gradients_may_not_be_written_with_them(view: str, write: str, behind: bool) -> None:
    def forward(training: Training, y: Tensor, written: bool) -> Tensor:
        h = VIEWS[view](y)
        alias = torch.no_grad()(lambda: h[..., 1:])()
        loss = (h * h).sum()
        if behind:
            loss.backward()
        try:
            if written:
                WRITES[write](alias)
            training.told += [h._version, alias._version, alias.requires_grad, alias.is_leaf]
        except RuntimeError as error:
            training.told.append(str(error)[:90])
        return (y * y).sum() if behind and written else loss

    expected = told_by(forward, contextlib.nullcontext())
    assert told_by(forward, kitsune.accelerate(device="cpu")) == expected


def test_the_counts_go_with_the_graph() -> None:
    layer, x = nn.Linear(4, 4), torch.ones(4, 4)
    there = []
    with kitsune.accelerate(device="cpu"):
        (pipeline,) = kitsune.contexts.here.depth
        for _ in range(6):
            h = torch.tanh(layer(x)).view(-1)
            aliased = h.detach()
            loss = (h * h).sum()
            assert loss.grad_fn is not None
            there.append(len(pipeline.recorder.lane.twins))
            loss.backward()
            aliased.tolist()
            del h, loss
    assert there[-1] == 1 and max(there) <= 2, "the step before is forgotten with its graph"


def test_where_nothing_was_detached_nothing_is_compared() -> None:
    """A program that keeps its losses keeps their graphs, and has each call compare what these have."""
    layer, x = nn.Linear(4, 4), torch.ones(4, 4)
    kept = []
    with kitsune.accelerate(device="cpu"):
        (pipeline,) = kitsune.contexts.here.depth
        for _ in range(6):
            h = torch.tanh(layer(x)).view(-1)
            loss = (h * h).sum()
            assert loss.grad_fn is not None
            loss.backward()
            kept.append((h, loss))
            kitsune.flush()
            assert pipeline.recorder.lane.twins == []
        assert kitsune.counters()["followed"] > 0


def test_a_view_that_was_written_before_it_was_read_is_made_again() -> None:
    """Autograd takes it again for who reads it next, and has no reason to where the calls are made again."""

    def forward(training: Training, y: Tensor, written: bool) -> Tensor:
        h = (y * 1.5).view(2, 8)
        h.detach().mul_(2)
        unused = h * 2
        loss = h.sin().sum()
        training.told.append(unused.requires_grad)
        return loss

    expected = told_by(forward, contextlib.nullcontext())
    assert not any(isinstance(told, str) for told in expected)
    assert told_by(forward, kitsune.accelerate(device="cpu")) == expected
    kitsune.reset()
    assert told_by(forward, with_graphs()) == expected
