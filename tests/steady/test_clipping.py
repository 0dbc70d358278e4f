"""Clipping by the norm is followed as one call; in one step, or in each, something is otherwise, and numbers stay eager's."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kitsune
from kitsune.lazy import clipping
from tests.runtime.repeated import graphs

STEPS, AT = 10, 7
pytestmark = pytest.mark.usefixtures("repeatable")


class Loop:
    """A training that clips; `otherwise` clips in another way in step AT, or in each."""

    def __init__(self, otherwise: Callable[[Loop], Any], always: bool = False, asks: bool = False) -> None:
        torch.manual_seed(3)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        self.leaves = list(self.model.parameters())
        self.optimizer = torch.optim.SGD(self.leaves, lr=0.1, momentum=0.9)
        self.otherwise, self.always, self.asks, self.at = otherwise, always, asks, -1
        self.norms: list[Any] = []
        self.create_graph = False
        self.grads: list[list[Tensor]] = []

    def run(self) -> Loop:
        for self.at, x in enumerate(torch.randn(STEPS, 4, 6).unbind()):
            other = self.always or self.at == AT
            self.optimizer.zero_grad()
            loss = self.model(x).square().sum()
            loss.backward(create_graph=self.create_graph)
            if self.asks and torch.isnan(loss):
                break
            self.norms.append(self.otherwise(self) if other else usual(self))
            self.grads.append([p.grad.detach().clone() for p in self.leaves if p.grad is not None])
            self.optimizer.step()
        return self

    def result(self) -> list[list[Any]]:
        grads = [[g.tolist() for g in of] for of in self.grads]
        return [[float(n) for n in self.norms], grads, [p.tolist() for p in self.leaves]]


def usual(loop: Loop) -> Any:
    return nn.utils.clip_grad_norm_(loop.leaves, 0.5)


def swapped(loop: Loop) -> Any:
    return nn.utils.clip_grad_norm_(loop.leaves[::-1], 0.5)


def one_is_missing(loop: Loop) -> Any:
    loop.leaves[1].grad = None
    return usual(loop)


def one_is_plain(loop: Loop) -> Any:
    with kitsune.disable():
        loop.leaves[1].grad = torch.full((8,), 3.0)
    return usual(loop)


def of_an_iterator(loop: Loop) -> Any:
    """Which can be gone through once, although one of its gradients is plain."""
    with kitsune.disable():
        loop.leaves[1].grad = torch.full((8,), 3.0)
    return nn.utils.clip_grad_norm_(iter(loop.leaves), 0.5)


class Loud(Tensor):
    """Sees the calls that it takes part in."""

    n_calls = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not getattr(func, "__name__", "").startswith("__"):
            cls.n_calls += 1
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def one_is_loud(loop: Loop) -> Any:
    loop.leaves[1].grad = torch.full((8,), 3.0).as_subclass(Loud)
    Loud.n_calls = 0
    norm = usual(loop).as_subclass(Tensor) + 100 * Loud.n_calls
    loop.leaves[1].grad = torch.ones(8)
    return norm


def one_is_shared(loop: Loop) -> Any:
    loop.leaves[3].grad = loop.leaves[3].grad
    return nn.utils.clip_grad_norm_([*loop.leaves, loop.leaves[3]], 0.5)


def one_is_written(loop: Loop) -> Any:
    loop.leaves[0].grad.mul_(2.0)  # type: ignore[union-attr]
    return usual(loop)


def twice(loop: Loop) -> Any:
    return usual(loop) + nn.utils.clip_grad_norm_(loop.leaves, 0.1)


def of_an_empty_generator(loop: Loop) -> Any:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        norm = nn.utils.clip_grad_norm_((p for p in ()), 0.5)
    return norm + len(caught)


def that_may_not_be_infinite(loop: Loop) -> Any:
    return nn.utils.clip_grad_norm_(loop.leaves, 0.5, error_if_nonfinite=True)


def by(*options: Any, **named: Any) -> Callable[[Loop], Any]:
    return lambda loop: nn.utils.clip_grad_norm_(loop.model.parameters(), *options, **named)


WAYS = {
    "usual": usual,
    "another norm": by(0.25),
    "a whole number": by(1),
    "the largest": by(0.5, float("inf")),
    "the sum": by(0.5, norm_type=1.0),
    "one by one": by(0.5, foreach=False),
    "named": by(max_norm=0.5, norm_type=2),
    "a tensor": lambda loop: nn.utils.clip_grad_norm_(loop.leaves[0], 0.5),
    "a tuple": lambda loop: nn.utils.clip_grad_norm_(tuple(loop.leaves), 0.5),
    "the norm is a tensor": by(torch.tensor(0.5)),
    "an iterator": of_an_iterator,
    "swapped": swapped,
    "one is missing": one_is_missing,
    "one is plain": one_is_plain,
    "one is loud": one_is_loud,
    "one is shared": one_is_shared,
    "one is written": one_is_written,
    "twice": twice,
    "nothing": of_an_empty_generator,
    "asks": that_may_not_be_infinite,
    "each another": lambda loop: nn.utils.clip_grad_norm_(loop.leaves, 0.5 + loop.at / 7),
}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The gradients that were clipped call by call behind the door."""
    found: list[Any] = []

    class Owner(clipping._Owner):
        __slots__ = ()

        def __init__(self, grad: Any) -> None:
            super().__init__(grad)
            found.append(grad)

    monkeypatch.setattr(clipping, "_Owner", Owner)
    yield found
    found.clear()


@pytest.mark.parametrize("always", [False, True], ids=["once", "always"])
@pytest.mark.parametrize("name", list(WAYS))
def test_clipping_is_as_in_eager(name: str, always: bool, made: list[Any]) -> None:
    asks = name in ("usual", "one is written", "swapped")
    expected = Loop(WAYS[name], always, asks).run().result()
    with graphs(kernels=False), kitsune.accelerate(device="cpu"):
        loop = Loop(WAYS[name], always, asks).run()
    assert loop.result() == expected


@pytest.mark.parametrize("way", [usual, by(0.5), one_is_missing], ids=["a list", "a generator", "one is missing"])
@pytest.mark.parametrize("asks", [False, True])
def test_of_many_steps_all_but_the_first_are_followed(asks: bool, way: Callable[[Loop], Any], made: list[Any]) -> None:
    """Also where the gradients are of the region before, since the loss was read in between."""
    with kitsune.accelerate(device="cpu"):
        Loop(way, always=True, asks=asks).run()
    assert 0 < len(made) <= 3 * 4


def test_norms_that_are_always_others_are_left_to_the_calls_that_torch_makes(made: list[Any]) -> None:
    """Each would be remembered, and none come again."""
    with kitsune.accelerate(device="cpu"):
        Loop(WAYS["each another"], always=True).run()
    assert len(made) <= 4 * 4


def test_gradients_with_a_history_are_none_of_ours(made: list[Any]) -> None:
    def run(loop: Loop) -> Loop:
        loop.create_graph = True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return loop.run()

    expected = run(Loop(usual)).result()
    with kitsune.accelerate(device="cpu"):
        loop = run(Loop(usual))
    assert loop.result() == expected and not made


def test_what_is_not_finite_is_refused_as_in_eager() -> None:
    def refused() -> list[str]:
        said = []
        x = nn.Parameter(torch.ones(3))
        for k in range(5):
            (x * (float("inf") if k == 4 else 2.0)).sum().backward()
            try:
                nn.utils.clip_grad_norm_([x], 0.5, error_if_nonfinite=True)
            except RuntimeError as error:
                said.append(str(error))
            x.grad = None
        return said

    expected = refused()
    with kitsune.accelerate(device="cpu"):
        assert refused() == expected
    assert len(expected) == 1
