"""Several passes with the same weights in one block: those behind the first have its casts, and are followed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import kitsune
from tests.steady.test_autocast_casts import as_in_eager, block, lost, twice
from tests.steady.test_cuts import STEPS, Loop, Step

CASES: dict[str, tuple[Step, int]] = {}


def case(backwards: int) -> Callable[[Step], Step]:
    """A step, and how many backwards are followed in the last one."""

    def add(step: Step) -> Step:
        CASES[step.__name__] = step, backwards
        return step

    return add


def backward(t: Loop, loss: Tensor, asked: bool) -> None:
    """Go backward from a loss whose graph is asked for now and then."""
    if asked:
        t.found.append(type(loss.grad_fn).__name__)
    loss.backward()


def end(t: Loop, loss: Tensor, asked: bool) -> None:
    """The rest of such a step."""
    backward(t, loss, asked)
    t.update()


@case(1)
def two_passes_in_a_block(t: Loop, k: int) -> None:
    """As of a siamese net: the second one has its weights cast already."""
    with block():
        one, other = t.net(t.xs[k, 0]), t.net(t.xs[k, 1])
        loss = (one - other).float().square().mean()
    loss.backward()
    t.update()


@case(1)
def two_losses_of_which_one_is_looked_at(t: Loop, k: int) -> None:
    with block():
        one = lost(t, k)
        t.found.append(one.item())
        other = lost(t, k, 1)
    (one + other).backward()
    t.update()


@case(0)
def a_graph_of_two_passes_is_asked_for(t: Loop, k: int) -> None:
    with block():
        loss = lost(t, k) + lost(t, k, 1)
        if k % 3 == 2:
            t.found.append(type(loss.grad_fn).__name__)
    loss.backward(retain_graph=k % 4 == 3)
    t.update()


@case(1)
def a_pass_without_gradients_and_two_with_them(t: Loop, k: int) -> None:
    """The graph of the two, asked for now and then, begins with a cast that the first has made, and which is not made again."""
    with block():
        with torch.no_grad():
            target = t.net(t.xs[k, 1])
        loss = (twice(t, k) - target.float().mean()) + twice(t, k, 1)
    end(t, loss, k in (7, 9))


@case(1)
def a_read_behind_a_pass_without_gradients(t: Loop, k: int) -> None:
    with block():
        loss = t.net.head(t.xs[k, 1]).float().square().mean()
        with torch.no_grad():
            loss = loss + F.linear(t.xs[k, 1], t.net.second.weight).float().mean()
        t.found.append(loss.item())
        for n in range(2):
            loss = loss + F.linear(t.xs[k, n], t.net.second.weight).float().sin().mean()
    end(t, loss, k in (7, 9))


@case(1)
def a_read_where_casts_are_not_kept(t: Loop, k: int) -> None:
    """What autograd saves is the second cast of a weight; the first one was needed by nobody."""
    weight = t.net.second.weight
    with block(cache_enabled=False):
        loss = torch.mm(t.xs[k, 0], weight).float().sin().mean()
        t.found.append(loss.item())
        loss = loss + torch.mm(F.linear(t.xs[k, 1], t.net.first.weight), weight).float().cos().mean()
    end(t, loss, k in (7, 9))


@case(2)
def a_pass_behind_a_backward(t: Loop, k: int) -> None:
    with block():
        twice(t, k).backward()
        loss = twice(t, k, 1)
        backward(t, loss, k in (7, 9))
    t.update()


@case(1)
def a_read_in_a_block_or_behind_it(t: Loop, k: int) -> None:
    """Of what was cast before the read, the second pass reads nothing, or all; also what autograd does not save."""
    with block():
        one = F.linear(t.xs[k, 0], t.net.first.weight).float().sin().mean()
        if k % 4 >= 2:
            t.found.append(one.item())
            other = F.linear(t.xs[k, 1], t.net.first.weight).float().cos().mean()
    if k % 4 < 2:
        t.found.append(one.item())
        with block():
            other = F.linear(t.xs[k, 1], t.net.first.weight).float().cos().mean()
    (one + other).backward()
    t.update()


@case(1)
def casts_are_kept_of_the_first_pass_or_not(t: Loop, k: int) -> None:
    with block():
        with block(cache_enabled=k % 2 > 0):
            loss = twice(t, k)
        loss = loss + twice(t, k, 1)
    end(t, loss, k in (8, 9))


@case(1)
def the_program_has_cast_them_itself(t: Loop, k: int) -> None:
    weight = t.net.second.weight
    with block():
        x = t.xs[k, 0].bfloat16()
        first = torch.mm(x, weight.bfloat16() if k % 2 else weight)
        loss = (first + torch.mm(x * 2, weight)).float().sin().mean()
    end(t, loss, k in (8, 9))


@pytest.mark.parametrize("way", ["op by op", "replayed"])
@pytest.mark.parametrize("name", CASES)
def test_passes_in_a_block_are_eagers_and_are_followed(name: str, way: str) -> None:
    step, backwards = CASES[name]
    assert as_in_eager(step, way) == backwards


def in_contexts_of_its_own(t: Loop, k: int, context: Callable[[], Any]) -> None:
    with block(), context():
        loss = twice(t, k)
        loss.backward()
    t.update()


def test_a_block_around_each_context_is_another_one_each_time() -> None:
    """Of what autocast forgets between contexts, the doors tell that stay where contexts are opened often."""
    found = []
    for context in (contextlib.nullcontext, lambda: kitsune.accelerate(device="cpu")):
        kitsune.reset()
        t = Loop()
        with kitsune.config.patch(gate=False):
            for k in range(STEPS):
                before = kitsune.counters()["backwards_followed"]
                in_contexts_of_its_own(t, k, context)
        found.append([p.tolist() for p in t.net.parameters()])
    assert found[0] == found[1] and kitsune.counters()["backwards_followed"] == before + 1


def test_a_context_is_left_in_the_middle_of_a_block() -> None:
    found = []
    for context in (contextlib.nullcontext, lambda: kitsune.accelerate(device="cpu")):
        kitsune.reset()
        t = Loop()
        with kitsune.config.patch(gate=False):
            for k in range(STEPS):
                opened = block()
                opened.__enter__()
                with context():
                    losses = [twice(t, k, 0), twice(t, k, 1)]
                with context():
                    losses.append(twice(t, k, 0) * 0.7)
                    opened.__exit__(None, None, None)
                    sum(losses).backward()  # type: ignore[union-attr]
                t.update()
        found.append([p.tolist() for p in t.net.parameters()])
    assert found[0] == found[1]


AWAY: dict[str, Callable[[], Any]] = {
    "disabled": kitsune.disable,
    "another context": lambda: kitsune.accelerate(device="cpu"),
    "another block": block,
    "contexts of another kind": lambda: kitsune.accelerate(device="cpu", warmup=2),
}


@pytest.mark.parametrize("away", AWAY)
def test_what_is_kept_in_a_block_stays_there_while_somebody_else_is_asked(away: str) -> None:
    def step(t: Loop, k: int) -> None:
        with block():
            losses = [twice(t, k, 0), twice(t, k, 1)]
            t.found.append(losses[1].tolist())
            with AWAY[away]():
                t.found.append(t.xs[k, 0].sum())
            losses.append(twice(t, k, 0) * 0.7)
        sum(losses).backward()  # type: ignore[union-attr]
        t.found.append(t.net.head.weight.grad.tolist())  # type: ignore[union-attr]
        t.update()

    as_in_eager(step, "op by op")
