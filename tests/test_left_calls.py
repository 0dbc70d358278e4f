"""Calls of decorated functions that are left to eager without a context: the gate hears of them what a context would tell."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import kitsune
from kitsune.gate import SHOWN
from kitsune.left_calls import UNSEEN, LeftCalls
from tests.interrupts import interrupted_at
from tests.test_left_to_eager import gated, measured, plain_step, small, spied

__all__ = ["gated", "measured"]
N = 40


def one_after_the_other(decorate: Callable[[Any], Any]) -> int:
    """Two functions, of an optimizer each: the steps of one of them are the program's."""
    pairs = [small(), small()]
    functions = [decorate(lambda pair=pair: plain_step(*pair)) for pair in pairs]
    for _ in range(N):
        for function in functions:
            function()
    return N


def one_in_another(decorate: Callable[[Any], Any]) -> int:
    model, optimizer = small()
    loss_of = decorate(lambda: model(torch.ones(5, 6)).square().mean())

    @decorate
    def step() -> None:
        optimizer.zero_grad()
        for _ in range(3):
            loss_of().backward()
        optimizer.step()

    for _ in range(N):
        step()
    return N


def a_block_inside(decorate: Callable[[Any], Any]) -> int:
    pair = small()

    @decorate
    def step() -> None:
        with kitsune.accelerate():
            plain_step(*pair)

    for _ in range(N):
        step()
    return N


def gradients_of_several_batches(decorate: Callable[[Any], Any]) -> int:
    model, optimizer = small()

    @decorate
    def step(updates: bool) -> None:
        model(torch.ones(5, 6)).square().mean().backward()
        if updates:
            optimizer.step()
            optimizer.zero_grad()

    for n in range(4 * N):
        step(n % 4 == 3)
    return N


def under_modes_of_others(decorate: Callable[[Any], Any]) -> int:
    pair = small()
    step = decorate(lambda: plain_step(*pair))
    for n in range(2 * N):
        with FlopCounterMode(display=False) if n % 2 else contextlib.nullcontext():
            step()
    assert kitsune.counters()["passed_through"]["FOREIGN_MODE"] == N
    return N


PROGRAMS = [
    one_after_the_other,
    one_in_another,
    a_block_inside,
    gradients_of_several_batches,
    under_modes_of_others,
]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.__name__)
def test_each_step_is_counted_once(program: Callable[[Callable[[Any], Any]], int]) -> None:
    assert program(kitsune.accelerate) - SHOWN == kitsune.counters()["gate_left"]


def test_another_program_is_measured_anew_though_the_last_one_was_left(measured: list[float]) -> None:
    first, second = small(), small(1)
    kitsune.gate.REVISIT = 10 * UNSEEN  # put back by the fixture
    with kitsune.accelerate():
        (pipeline,) = kitsune.contexts.here.depth
    pipeline.gate.restart()

    def call(pair: Any) -> None:
        opened.append(bool(kitsune.contexts.here.depth))
        measured[0] += 1.5 if pair is first and torch._C._len_torch_dispatch_stack() else 1.0
        plain_step(*pair)

    opened: list[bool] = []
    step = kitsune.accelerate(call)
    for _ in range(UNSEEN):
        step(first)
    assert not opened[-1] and kitsune.counters()["gate_left"]
    opened.clear()
    for _ in range(2 * UNSEEN):
        step(second)
    # Once the new optimizer has been seen, its steps are recorded.
    assert not opened[0] and all(opened[UNSEEN + 1 :])


def test_an_optimizer_that_is_gone_takes_no_further_steps() -> None:
    pair = small()
    step, opened = spied(lambda: plain_step(*pair))
    for _ in range(SHOWN + 3):
        step()
    assert opened[-3:] == [False] * 3
    pair = small(1)
    step()
    assert opened[-1]


def test_a_reset_in_the_middle_of_a_call_begins_anew() -> None:
    pair = small()

    def call(resets: bool = False) -> None:
        if resets:
            kitsune.reset()
        plain_step(*pair)

    step, opened = spied(call)
    for _ in range(SHOWN + 3):
        step()
    step(True)
    opened.clear()
    for _ in range(SHOWN + 3):
        step()
    assert opened == [True] * SHOWN + [False] * 3


def test_blocks_inside_of_a_call_are_no_steps_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def call(x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            with kitsune.accelerate():
                x = x * 2
        return x

    found = []
    for _ in range(2):
        kitsune.reset()
        function, opened = spied(call)
        for _ in range(N):
            function(torch.ones(2))
        found.append((kitsune.counters()["gate_left"], opened[-1]))
        # As it is with a context around each call.
        monkeypatch.setattr(LeftCalls, "may_be_left", lambda *_: False)
    assert found == [(found[1][0], False), (found[1][0], True)] and found[0][0]


def test_calls_in_the_programs_own_context_tell_nothing_of_others() -> None:
    pair = small()
    step, opened = spied(lambda: plain_step(*pair))
    for _ in range(SHOWN + 3):
        step()
    with kitsune.accelerate():
        plain_step(*pair)
        step()
    step()
    assert opened[-2:] == [True, False]


def test_after_an_interrupt_at_any_line_calls_are_left_as_before() -> None:
    pair = small()
    step, opened = spied(lambda: plain_step(*pair))
    for _ in range(SHOWN + 3):
        step()
    k = 1
    while interrupted_at(k, step, "left_calls.py"):
        assert not kitsune.contexts.here.in_left_call
        n_left = kitsune.counters()["gate_left"]
        step()
        assert not opened[-1] and kitsune.counters()["gate_left"] == n_left + 1
        k += 1
    assert k > 10
