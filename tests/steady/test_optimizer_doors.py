"""What torch's optimizers do around an update is as in eager: marks for profilers, gradients that are dropped or zeroed."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

import kitsune


def trained(steps: int, set_to_none: bool = True) -> list[torch.Tensor]:
    torch.manual_seed(2)
    model = nn.Linear(6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    found = []
    for x in torch.randn(steps, 4, 6).unbind():
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
        found += [torch.zeros(()) if p.grad is None else p.grad.detach().clone() for p in model.parameters()]
    return [*found, *(p.detach() for p in model.parameters())]


def marks() -> Counter[tuple[str, bool]]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        trained(6)
    found = [event for event in profile.events() if event.name.startswith("Optimizer.")]
    return Counter((event.name, event.is_user_annotation) for event in found)


@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_are_dropped_or_zeroed(to_none: bool) -> None:
    expected = trained(6, to_none)
    with kitsune.accelerate(device="cpu"):
        found = trained(6, to_none)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*Profiler clears events:UserWarning")
def test_who_profiles_sees_the_marks() -> None:
    expected = marks()
    assert expected == {("Optimizer.step#SGD.step", True): 6, ("Optimizer.zero_grad#SGD.zero_grad", True): 6}
    with kitsune.accelerate(device="cpu"):
        assert marks() == expected


def test_a_mark_can_end_where_there_is_no_door() -> None:
    mark = torch.autograd.profiler.record_function("Optimizer.mine")
    with kitsune.accelerate(device="cpu"):
        mark.__enter__()
        torch_own = torch.autograd.profiler.record_function.__exit__.__wrapped__  # type: ignore[attr-defined]
    torch_own(mark, None, None, None)


def test_the_gate_closes_the_doors_inside_of_a_mark() -> None:
    """It leaves a program to eager at the end of a step, where torch's mark is open still."""
    expected = trained(8)
    with kitsune.config.patch(gate=True), kitsune.accelerate(device="cpu"):
        found = trained(8)
    assert kitsune.counters()["gate_left"] > 0
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def with_momentum_later(static: bool, on: bool) -> list[torch.Tensor]:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(x: torch.Tensor) -> torch.Tensor:
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    call = kitsune.accelerate(device="cpu", static=static)(step) if on else step
    found = []
    for k, x in enumerate(torch.randn(24, 4, 6).unbind()):
        optimizer.param_groups[0]["momentum"] = 0.9 if 8 <= k < 16 else 0.0
        found.append(call(x).clone())
    buffers = [optimizer.state[p]["momentum_buffer"] for p in model.parameters()]
    return [*found, *buffers, *(p.detach() for p in model.parameters())]


@pytest.mark.parametrize("static", [False, True])
def test_momentum_begins_and_ends_in_mid_training(static: bool) -> None:
    """With it the optimizer has buffers, which are in its lists, and without it none."""
    kitsune.reset()
    for a, b in zip(with_momentum_later(static, True), with_momentum_later(static, False), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
