"""Operators whose plans each thread makes for itself are run once per shape, before a step needs them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kitsune
from kitsune.ir import Op, streams
from kitsune.runtime import ThreadPlans, thread_plans
from kitsune.runtime.calls import try_out
from kitsune.runtime.plan_thread import plan_thread
from tests.plan.recorded import record


def convolutions(n: int = 2) -> kitsune.ir.Graph:
    torch.manual_seed(0)
    layers = nn.Sequential(*[nn.Conv2d(4, 4, 3, padding=1) for _ in range(n)], nn.Conv2d(4, 2, 1))
    x = torch.randn(2, 4, 8, 8)

    def step() -> None:
        F.mse_loss(layers(x), torch.zeros(2, 2, 8, 8)).backward()

    return record(step, warmup=1)


def test_each_shape_is_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(thread_plans, "try_out", lambda op, values: made.append((op, values)))
    graph, plans = convolutions(), ThreadPlans()
    backwards = [op for op in graph.ops if op.target._opname == "convolution_backward"]
    assert len(backwards) == 3
    plans.make(graph)
    plans.make(graph)
    plans.make(convolutions(3))
    # The first layer's input needs no gradient, which makes it another call than the layer after it.
    assert len(made) == 3
    for op, values in made:
        assert [values[v.id].shape for v in op.inputs] == [v.type.shape for v in op.inputs]
        assert [values[v.id].stride() for v in op.inputs] == [v.type.stride for v in op.inputs]


def test_those_of_a_region_to_come_are_made_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    clock = iter(range(100))
    monkeypatch.setattr(thread_plans, "try_out", lambda op, values: made.append(op.target._opname))
    monkeypatch.setattr(thread_plans.time, "perf_counter", lambda: next(clock) * thread_plans.SECONDS * 0.4)
    graph, plans = convolutions(), ThreadPlans()
    left = plans.needed(graph)
    # Two layers and their backwards are alike but for the gradient of the first one's input.
    assert len(left) == 5
    # Each has run where it was asked for, in the background, which loads what is the same for all threads.
    assert sorted(made) == ["convolution"] * 2 + ["convolution_backward"] * 3
    made.clear()
    n_made = []
    while left:
        plans.go_on(left)
        n_made.append(len(made))
    assert n_made[0] == 3 and n_made[-1] == 5 and sorted(made) == ["convolution"] * 2 + ["convolution_backward"] * 3
    assert not plans.needed(graph)
    # What has run in this thread needs none.
    others = ThreadPlans()
    others.make(graph)
    assert len(made) == 8 and not others.needed(graph)


def test_they_take_twice_as_long_as_the_step_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Op] = []
    now = [100.0]

    def try_out(op: Op, values: object) -> None:
        made.append(op)
        now[0] += 0.003

    monkeypatch.setattr(thread_plans, "try_out", try_out)
    monkeypatch.setattr(thread_plans.time, "perf_counter", lambda: now[0])
    graph, plans, n_made = convolutions(), ThreadPlans(), []
    one = plans.needed(graph)[0]
    for seconds in (0.5, 0.004, 0.001, 10.0):
        now[0] += seconds
        plans._known.clear()
        before = len(made)
        plans.go_on([replace(one, kwargs=(("number", k),)) for k in range(20)])
        n_made.append(len(made) - before)
    # At least one each time, or it would never end.
    assert n_made == [2, 3, 1, 9] and (thread_plans.SECONDS, thread_plans.MOST) == (0.004, 0.025)


def test_nothing_is_run_into_a_graph_that_the_program_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    monkeypatch.setattr(thread_plans, "try_out", lambda op, values: made.append(op.target._opname))
    graph, plans = convolutions(), ThreadPlans()
    with monkeypatch.context() as patch:
        patch.setattr(streams, "is_captured", lambda: True)
        plans.make(graph)
        plans.go_on(left := plans.needed(graph))
        plans.make_all(left)
        assert len(left) == 5 and not made
    plans.go_on(left)
    plans.make_all(left)
    assert len(made) == 5 and not plans.needed(graph)


def test_an_operator_that_fails_is_left_to_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    failures = iter([torch.OutOfMemoryError("no memory"), TypeError("an argument of another kind"), IndexError("no number")])

    def fail(*_: object) -> None:
        raise next(failures)

    monkeypatch.setattr(thread_plans, "try_out", fail)
    ThreadPlans().make(convolutions())
    assert not list(failures)


def test_what_is_tried_out_may_return_what_it_likes(recwarn: pytest.WarningsRecorder) -> None:
    graph = convolutions()
    op = next(op for op in graph.ops if op.target._opname == "convolution")
    elsewhere = replace(op, results=(replace(op.results[0], type=op.inputs[0].type),))
    tensors = {v.id: torch.ones(v.type.shape) for v in op.inputs}
    try_out(elsewhere, tensors)
    assert not recwarn.list and tensors.keys() == {v.id for v in op.inputs}


@pytest.mark.gpu
def test_the_first_step_makes_the_plans_that_the_second_needs() -> None:
    conv = nn.Conv2d(8, 8, 3, device="cuda")
    kitsune.reset()
    with kitsune.config.patch(gate=False), kitsune.accelerate(device="cuda"):
        optimizer = torch.optim.SGD(conv.parameters(), lr=0.1)
        conv(torch.randn(4, 8, 16, 16, device="cuda")).sum().backward()
        optimizer.step()
        pipeline = next(iter(kitsune.contexts.here.depth))
        # Autograd's thread has those of the backward, and one of Kitsune's.
        assert [op._opname for op, *_ in pipeline.runner.thread_plans._known] == ["convolution"]
        assert "convolution_backward" in {op._opname for op, *_ in plan_thread.known}
