"""A number is read while a backward is owed: what each look of `cuts.py` keeps from going wrong."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import kitsune
from tests.runtime.repeated import graphs
from tests.steady.test_cuts import Loop, Step, run

CASES: dict[str, Step] = {}


def case(step: Step) -> Step:
    CASES[step.__name__] = step
    return step


def _two_more(t: Loop, k: int) -> tuple[Tensor, Tensor, Tensor]:
    out = t.net(t.xs[k, 0])
    terms = [(f(t.net.hidden) * t.net.first.bias).mean() / 8 for f in (Tensor.exp, Tensor.sin)]
    return F.cross_entropy(out, t.ys[k, 0]), terms[0], terms[1]


def _stepped(t: Loop, loss: Tensor) -> None:
    loss.backward()
    t.update()


@case
def a_term_is_used_later_on(t: Loop, k: int) -> None:
    loss, term, _ = _two_more(t, k)
    if k < 5:
        del term
    t.found.append(loss.item())
    _stepped(t, loss if k < 5 else loss + term)


@case
def a_term_is_used_at_first(t: Loop, k: int) -> None:
    loss, term, _ = _two_more(t, k)
    if k >= 5:
        del term
    t.found.append(loss.item())
    _stepped(t, loss if k >= 5 else loss + term)


@case
def one_term_or_the_other_or_both(t: Loop, k: int) -> None:
    loss, one, other = _two_more(t, k)
    if k // 3 in (0, 2):
        del one
    if k // 3 in (1, 2):
        del other
    t.found.append(loss.item())
    if k // 3 in (1, 3):
        loss = loss + one
    if k // 3 in (0, 3):
        loss = loss + other * 2
    _stepped(t, loss)


@case
def a_value_in_the_middle_is_used_again(t: Loop, k: int) -> None:
    first = t.net.first(t.xs[k, 0]).exp()
    second = first.sin()
    loss = second.cos().mean()
    if k < 5:
        del first, second
    t.found.append(loss.item())
    _stepped(t, loss if k < 5 else loss + (second * first.tanh()).mean())


@case
def a_number_is_written_between_reads(t: Loop, k: int) -> None:
    loss = t.loss(k)
    total = torch.zeros(())
    if k % 5 == 3:
        t.found.append(loss.item())
    total += loss.detach()
    t.found.append(total.item())
    total *= 0.5
    t.found.append(total.item())
    total += 1
    _stepped(t, loss * total.detach())


@pytest.mark.parametrize("way", ["op by op", "replayed"])
@pytest.mark.parametrize("name", CASES)
def test_what_is_held_at_a_read_changes(name: str, way: str) -> None:
    expected, _ = run(CASES[name], contextlib.nullcontext())
    kitsune.reset()
    with graphs(kernels=False) if way == "replayed" else contextlib.nullcontext():
        got, counts = run(CASES[name], kitsune.accelerate(device="cpu"))
    assert got == expected
    assert counts[-1][1] == 1


def test_two_terms_in_turn_are_followed() -> None:
    def step(t: Loop, k: int) -> None:
        loss, *terms = _two_more(t, k)
        del terms[k % 2]
        t.found.append(loss.item())
        (loss + terms.pop()).backward()
        t.update()

    expected, _ = run(step, contextlib.nullcontext())
    got, counts = run(step, kitsune.accelerate(device="cpu"))
    assert got == expected and [backwards for _, backwards, *_ in counts[-4:]] == [1] * 4


def regions() -> list[Any]:
    return [pipeline.recorder.region for pipeline in kitsune.contexts.here.depth]


def test_a_number_that_is_read_behind_the_backward_ends_the_region() -> None:
    """Nothing is owed any more that could be kept from being made again."""
    t = Loop()
    with kitsune.accelerate(device="cpu"):
        for k in range(4):
            loss = t.loss(k)
            loss.item()
            loss.backward()
            t.net.head.weight.grad.sum().item()  # type: ignore[union-attr]
            assert [region.node.depth for region in regions()] == [0]
            t.update()


def test_a_static_function_that_reads_is_run_as_in_eager() -> None:
    def step(t: Loop, k: int) -> None:
        loss = t.loss(0)
        t.found.append(loss.item())
        _stepped(t, loss)

    expected, _ = run(step, contextlib.nullcontext())
    kitsune.reset()
    with graphs(kernels=False):
        got, _ = run(kitsune.accelerate(static=True, device="cpu")(step), contextlib.nullcontext())
    assert got == expected
