"""torch.compile inside of a context and a context inside of what is compiled: with the compiler that runs graphs as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import kitsune
from tests.chaos.counting import Counts, Loop, many

Way = Callable[[Loop, Callable[[], Any]], Callable[[int], None]]


def compiled(function: Any) -> Any:
    return torch.compile(function, backend="eager")


def a_part_of_the_model(loop: Loop, context: Callable[[], Any]) -> Callable[[int], None]:
    assert isinstance(loop.model, nn.Sequential)
    loop.model[1] = compiled(loop.model[1])
    return loop.step


def the_model(loop: Loop, context: Callable[[], Any]) -> Callable[[int], None]:
    loop.model = compiled(loop.model)
    return loop.step


def the_loss(loop: Loop, context: Callable[[], Any]) -> Callable[[int], None]:
    loop.loss = compiled(loop.loss)  # type: ignore[method-assign]
    return loop.step


def a_function_that_opens_a_context(loop: Loop, context: Callable[[], Any]) -> Callable[[int], None]:
    @compiled
    def step(i: int) -> None:
        with context():
            loop.step(i)

    return step


def from_the_third_step_on(loop: Loop, context: Callable[[], Any]) -> Callable[[int], None]:
    model = loop.model

    def step(i: int) -> None:
        loop.model = compiled(model) if i % 4 > 1 else model
        loop.step(i)

    return step


WAYS = [a_part_of_the_model, from_the_third_step_on, the_model, the_loss, a_function_that_opens_a_context]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("way", WAYS[: many(2, 5)])
def test_a_training_with_compiled_parts(way: Way, counts: Counts) -> None:
    def program(context: Callable[[], Any]) -> list[Any]:
        torch._dynamo.reset()
        loop = Loop()
        step = way(loop, context)
        with context():
            for i in range(7):
                step(i)
        return loop.state()

    counts.check(way.__name__, program)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("warmup", [0, 1])
def test_a_backward_in_a_context_through_what_was_compiled_before_it(warmup: int) -> None:
    # Differentiated ahead of time, as by inductor: the backward was compiled for plain tensors.
    function = torch.compile(lambda x: (x * 2).sin(), backend="aot_eager")
    x, expected = torch.linspace(-1, 1, 6, requires_grad=True), []
    for step in range(4):
        y = function(x * (step + 1))
        with kitsune.accelerate(warmup=warmup, device="cpu"):
            (y * y).sum().backward()
        z = (x.detach() * (step + 1)).requires_grad_()
        ((z * 2).sin() ** 2).sum().backward()
        expected.append(z.grad * (step + 1))
        torch.testing.assert_close(x.grad, sum(expected))
    torch._dynamo.reset()
