"""What autograd did not know yet is told before somebody needs it. Each was once a gradient silently missing or wrong."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kitsune
from tests.chaos.counting import Counts

TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "vmap": lambda x: torch.func.vmap(lambda row: row * 2 + 1)(x),
    "functionalize": lambda x: torch.func.functionalize(lambda x: x * 2)(x),
    "grad": lambda x: torch.func.grad(lambda x: (x * x).sum())(x),
    "jvp": lambda x: torch.func.jvp(torch.sin, (x,), (torch.ones_like(x),))[0],
    "vjp": lambda x: torch.func.vjp(torch.sin, x)[0],
    "jacrev": lambda x: torch.func.jacrev(lambda x: x.sin().sum())(x),
    "hessian": lambda x: torch.func.hessian(lambda x: (x**3).sum())(x),
}


def five_steps(step: Callable[[Tensor, list[Any]], None], context: Callable[[], Any]) -> list[Any]:
    w, seen = nn.Parameter(torch.arange(12.0).view(4, 3) / 5), []
    for _ in range(5):
        with context():
            step(w, seen)
            seen.append(None if w.grad is None else w.grad.clone())
            w.grad = None
    return seen


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # forward derivatives are scripted by torch itself
@pytest.mark.parametrize("warmup", [0, 1])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_is_given_results_with_their_history(name: str, warmup: int, counts: Counts) -> None:
    def step(w: Tensor, seen: list[Any]) -> None:
        found = TRANSFORMS[name]((w * 2).tanh())
        seen.append(found.requires_grad)
        found.sum().backward()

    def program(context: Callable[[], Any]) -> list[Any]:
        return five_steps(step, context)

    counts.check(name, program, lambda: kitsune.accelerate(warmup=warmup, device="cpu"))
    assert kitsune.counters()["followed"] > 0


def test_a_plain_tensor_that_got_a_history_by_a_write_is_no_leaf_the_next_time(counts: Counts) -> None:
    def program(context: Callable[[], Any]) -> list[Any]:
        w, kept, sum_ = nn.Parameter(torch.ones(3)), torch.zeros(2, 3), torch.zeros(2, 3)
        with context():
            for _ in range(2):
                sum_.add_(kept)
                kept[:] = w
                kitsune.flush()
            return [kept.requires_grad, sum_.requires_grad, torch.autograd.grad(sum_.sum(), w)[0]]

    for warmup in (0, 1):
        counts.check(f"warmup {warmup}", program, lambda warmup=warmup: kitsune.accelerate(warmup=warmup, device="cpu"))


def test_what_has_no_gradient_counts_a_write_with_one_once(counts: Counts) -> None:
    def program(context: Callable[[], Any]) -> list[Any]:
        w, kept = nn.Parameter(torch.arange(-2.0, 2.0)), []
        for _ in range(4):
            with context():
                mask = torch.logical_not(w)
                mask.copy_(w)
            kept.append(mask._version)
        return kept

    counts.check("version", program)


@pytest.mark.parametrize(
    "call", [lambda y: F.relu(y, inplace=True), lambda y: F.relu(y, True), lambda y: F.dropout(y, 0.0, True, True)]
)
def test_a_function_that_writes_because_it_is_asked_to(call: Callable[[Tensor], Tensor], counts: Counts) -> None:
    """Its name does not say so: the backward of what it wrote must fail as in eager."""

    def program(context: Callable[[], Any]) -> list[Any]:
        w, seen = nn.Parameter(torch.arange(-2.0, 3.0)), []
        for i in range(6):
            with context(), contextlib.suppress(RuntimeError):
                y = w.exp()
                with torch.no_grad():
                    call(y)
                (y if i > 3 else w * 2).sum().backward()
            seen += [None if w.grad is None else w.grad.clone(), y._version]
            w.grad = None
        return seen

    counts.check("in place", program)


def test_an_update_takes_gradients_that_are_plain_at_one_time_and_recorded_at_another(counts: Counts) -> None:
    def program(context: Callable[[], Any]) -> list[Any]:
        w = nn.Parameter(torch.arange(3.0))
        optimizer = torch.optim.AdamW([w], lr=0.1, fused=True)
        with context():
            for i in range(8):
                w.grad = torch.ones(3) * 2
                if i % 3 == 2:
                    with kitsune.disable():
                        w.grad = torch.ones(3) * 2
                kitsune.flush()
                optimizer.step()
        return [w.detach().clone()]

    for warmup in (0, 1):
        counts.check(f"warmup {warmup}", program, lambda warmup=warmup: kitsune.accelerate(warmup=warmup, device="cpu"))


def test_a_view_whose_history_autograd_cannot_tell_can_be_read(counts: Counts) -> None:
    def program(context: Callable[[], Any]) -> list[Any]:
        w = nn.Parameter(torch.arange(6.0).view(3, 2))
        column, _ = w.unbind(-1)
        with context(), torch.no_grad():
            w.copy_(w * 0.5)
            return [column.detach().numpy().tolist()]

    counts.check("column", program)
