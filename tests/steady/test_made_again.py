"""Calls that were followed are made again for their graph: it is that of eager, whenever and wherever somebody asks for it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kitsune
from kitsune.pipeline import tally
from kitsune.session import trace_regions

STEPS, AT = 12, 8
BF16, FP16 = torch.bfloat16, torch.float16
Step = Callable[["Training", Callable[[Any], None]], Any]


@pytest.fixture(autouse=True)
def ungated() -> Iterator[None]:
    kitsune.reset()
    with kitsune.config.patch(gate=False):
        yield
    kitsune.reset()


class Training:
    """Takes steps that give a loss; from AT on, somebody looks at the graph wherever a step says so."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.leaves = [*self.a.parameters(), *self.b.parameters()]
        self.optimizer = torch.optim.SGD(self.leaves, lr=0.001, foreach=True)
        self.x, self.stat = torch.randn(3, 4), torch.zeros(4)
        self.seen: list[Any] = []
        self.at = 0

    def run(self, step: Step) -> list[Any]:
        for self.at in range(STEPS):
            self.optimizer.zero_grad()

            def look(tensor: Any) -> None:
                if self.at >= AT:
                    self.seen.append(tensor.grad_fn is not None)

            loss = step(self, look)
            loss.backward()
            self.optimizer.step()
            self.seen.append(loss.item())
        with autocast(BF16):
            # Of the weights as they are now.
            self.seen.append(self.a(torch.ones(5, 4)).tolist())
        return [*self.seen, *[leaf.tolist() for leaf in self.leaves]]


def autocast(dtype: Any) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=dtype)


def randomly(t: Training, look: Callable[[Any], None]) -> Any:
    """Dropout writes to what it has made for itself, which its backward needs."""
    y = F.dropout(t.a(t.x.neg()), 0.5)
    look(y)
    return y.square().sum()


def written_as_a_list(t: Training, look: Callable[[Any], None]) -> Any:
    """Autograd does not count each write to the tensors of a list."""
    y, z = t.a(t.x.neg()), t.b(t.x.neg())
    torch._foreach_mul_([y, z], 2.0)
    torch._foreach_add_([y, z], [z, y])
    look(y)
    t.seen.append((y._version, z._version) if y.grad_fn is not None else None)
    return (y.sin() * z).sum()


def afterwards(t: Training, look: Callable[[Any], None]) -> Any:
    with autocast(BF16):
        y = t.b(t.a(t.x.neg()))
    look(y)
    return y.float().square().sum()


def twice(t: Training, look: Callable[[Any], None]) -> Any:
    """Each context casts a weight once."""
    with autocast(BF16):
        y = t.a(t.a(t.x.neg()))
    with autocast(BF16):
        z = t.a(y)
    look(z)
    return z.float().square().sum()


def in_different_precisions(t: Training, look: Callable[[Any], None]) -> Any:
    with autocast(BF16):
        y = t.b(t.a(t.x.neg()))
    z = t.b(t.x.neg())
    with autocast(FP16):
        look(y)
        w = t.a(t.x.neg())
        t.seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), t.b(t.x).dtype))
    look(w)
    t.seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), t.b(t.x).dtype))
    return y.float().square().sum() + (z * w).sum()


def within(t: Training, look: Callable[[Any], None]) -> Any:
    """A weight that was cast before is not cast again behind the look."""
    with autocast(BF16):
        y = t.a(t.x.neg())
        look(y)
        z = t.a(y.sin())
    return z.float().square().sum()


def without_gradients(t: Training, look: Callable[[Any], None]) -> Any:
    y = t.b(t.a(t.x.neg()))
    with torch.no_grad():
        look(y)
    return y.square().sum()


def past_the_api(t: Training, look: Callable[[Any], None]) -> Any:
    y = t.a(t.x.neg())
    look(y)
    with torch._C.DisableTorchFunction():
        z = y * 2
    return t.b(z).square().sum()


def one_loss_of_two(t: Training, look: Callable[[Any], None]) -> Any:
    """The calls of the first are no longer there when those of the second are made again."""
    y = t.a(t.x.neg()).sin().square().sum()
    with torch.no_grad():
        t.stat.add_(1)
    z = t.b(t.x.neg()) * t.stat
    y.backward()
    look(z)
    return z.square().sum()


def as_a_view(t: Training, look: Callable[[Any], None]) -> Any:
    y = t.a(t.x.neg())
    z = y.view(4, 3)
    y.mul_(2)
    look(z)
    return (z * 3).square().sum()


def written_behind(t: Training, look: Callable[[Any], None]) -> Any:
    """A write that was learned when no call was owed comes when some are."""
    y = t.a(t.x.neg())
    y.mul_(2)
    if t.at < AT:
        t.seen.append(y.grad_fn is not None)
    with torch.no_grad():
        y.add_(1)
    look(y)
    return (y * 3).sum()


PROGRAMS: dict[str, Step] = {
    "randomly": randomly,
    "lists": written_as_a_list,
    "afterwards": afterwards,
    "twice": twice,
    "in different precisions": in_different_precisions,
    "within": within,
    "without gradients": without_gradients,
    "past the API": past_the_api,
    "one loss of two": one_loss_of_two,
    "as a view": as_a_view,
    "written behind": written_behind,
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_who_looks_at_the_graph_sees_that_of_eager(name: str) -> None:
    expected = Training().run(PROGRAMS[name])
    with kitsune.accelerate(device="cpu"):
        assert Training().run(PROGRAMS[name]) == expected
    assert tally.realized > 0


@pytest.mark.parametrize("name", ["randomly", "lists", "as a view", "one loss of two", "written behind"])
def test_the_operators_of_a_step_in_which_somebody_looks_are_those_of_one_that_is_not_followed(name: str) -> None:
    """A kernel may keep what a value was before it was written: which of them is read matters there."""

    def graphs(follow: bool) -> list[str]:
        kitsune.reset()
        with kitsune.config.patch(follow=follow), trace_regions() as found, kitsune.accelerate(device="cpu"):
            Training().run(PROGRAMS[name])
        return [str(graph) for graph in found]

    assert graphs(follow=True)[-3:] == graphs(follow=False)[-3:]


def test_what_is_used_up_says_so_past_the_api() -> None:
    with kitsune.accelerate(device="cpu"):
        layer = nn.Linear(4, 4)
        for k in range(STEPS):
            y = layer(torch.ones(2, 4).neg())
            y.square().sum().backward()
            if k == STEPS - 1:
                with torch._C.DisableTorchFunction():
                    z = y * 2
                with pytest.raises(RuntimeError, match="backward through the graph a second time"):
                    z.sum().backward()


def test_a_gradient_of_what_is_used_up_says_so() -> None:
    def run(context: Callable[[], AbstractContextManager[Any]]) -> list[str]:
        torch.manual_seed(3)
        layer, other, said = nn.Linear(4, 4), nn.Linear(4, 4), []
        with context():
            for k in range(STEPS):
                y = layer(torch.ones(2, 4).neg())
                y.square().sum().backward()
                if k == STEPS - 1:
                    # Of a leaf that has no part in it, too.
                    for leaf in (layer.weight, other.weight):
                        with contextlib.suppress(RuntimeError):
                            found: Any = "none"
                            found = torch.autograd.grad(y.sum(), [leaf], allow_unused=True)[0]
                        said.append(found is None or found)
        return said

    expected = run(contextlib.nullcontext)
    assert run(lambda: kitsune.accelerate(device="cpu")) == expected
