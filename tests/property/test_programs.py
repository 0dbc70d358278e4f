"""Random programs leave the same tensors behind, and see the same on the way, in eager and under Kitsune."""

from __future__ import annotations

import warnings
from contextlib import nullcontext

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings

import kitsune
from tests.property import steps, steps_autograd  # noqa: F401  (they fill the table)
from tests.property.strategies import STEPS, Builder, programs, start
from tests.property.world import Program, differences

ROUNDS = 3
EXAMPLES = max(200, settings().max_examples)  # HYPOTHESIS_PROFILE=search asks for more
SLOW = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


def check(program: Program, warmup: int) -> None:
    expected = program.run(nullcontext(), eager=True)
    kitsune.reset()
    for turn in range(ROUNDS):
        got = program.run(kitsune.accelerate(warmup=warmup, device="cpu"))
        assume(expected.refused_again or not got.refused_again)
        assert not (found := differences(expected, got)), f"round {turn}: {found}"
    assert kitsune.counters()["recorded"] > 0


@settings(SLOW, max_examples=EXAMPLES)
@given(programs())
def test_lazy_from_the_first_op_is_as_eager(program: Program) -> None:
    check(program, warmup=0)


@settings(SLOW, max_examples=EXAMPLES)
@given(programs())
def test_lazy_after_an_observed_round_is_as_eager(program: Program) -> None:
    check(program, warmup=1)


@settings(SLOW, max_examples=20)
@given(programs())
def test_two_eager_runs_agree(program: Program) -> None:
    """The oracle itself: a program that eager does not repeat would blame Kitsune."""
    assert not differences(program.run(nullcontext(), eager=True), program.run(nullcontext()))


@pytest.mark.parametrize("name", sorted(name for name in STEPS if not name[-1].isdigit() and name != "illegal"))
def test_every_step_succeeds_somewhere(name: str) -> None:
    """A step that always raises tests nothing."""
    warnings.simplefilter("ignore")  # pytest puts the filters back
    seen = []
    for i in range(40):
        builder = Builder()
        start(builder, i)
        builder.add(STEPS[name](builder, i, i + 1, i), builder.program.inside)
        seen.append(builder.world.seen[-1])
        torch.set_grad_enabled(True)
    assert sum("Error at" not in line for line in seen) >= 8, seen
