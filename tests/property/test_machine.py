"""The machine of two worlds, driven by hypothesis: a few scripts in a normal run, many by `python -m tests.property.machine`."""

from __future__ import annotations

from collections import Counter
from typing import ClassVar

import torch
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

import kitsune
from tests.property.machine import Machine, compare

NUMBER = st.integers(0, 2**32 - 1)
FOLLOWED = ("followed", "backwards_followed", "updates_followed", "realized")


class TwoWorldsMachine(RuleBasedStateMachine):
    """Hypothesis gives each rule the same weight, so the commonest is here twice; what rules do is scattered by a number."""

    counts: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.machine = Machine(0)
        self.machine.enter()

    @rule(number=NUMBER)
    def line(self, number: int) -> None:
        self.machine.line(number)

    @rule(number=NUMBER)
    def another_line(self, number: int) -> None:
        self.machine.line(number)

    @rule(number=NUMBER)
    def part(self, number: int) -> None:
        self.machine.part(number)

    @rule(number=NUMBER)
    def part_again(self, number: int) -> None:
        self.machine.again(number)

    @rule(number=NUMBER)
    def leave_and_enter(self, number: int) -> None:
        self.machine.leave(number)
        self.machine.enter()

    @rule()
    def enter_another(self) -> None:
        self.machine.enter()

    @rule()
    def check(self) -> None:
        self.machine.put("check()")

    @rule()
    def look(self) -> None:
        self.machine.put("look()")

    def teardown(self) -> None:
        torch.set_grad_enabled(True)
        for warmup in (0, 1):
            found = compare(self.machine.script, warmup)
            assert not found, "\n".join([*self.machine.script, *found])
            self.counts.update({name: kitsune.counters()[name] for name in FOLLOWED})


def test_both_worlds_agree() -> None:
    TwoWorldsMachine.counts.clear()
    few = settings(max_examples=6, stateful_step_count=10, deadline=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(TwoWorldsMachine, settings=few)
    # What is recorded alone would not show what following gets wrong.
    assert all(TwoWorldsMachine.counts[name] > 0 for name in FOLLOWED), TwoWorldsMachine.counts


def test_nothing_is_written_that_torch_may_not_resize_for_it() -> None:
    machine = Machine(0)
    kept = "torch.add(t3[None], 1, out=t4)"
    machine.put("t9 = torch.from_numpy(np.arange(3.0))", "torch.add(t9, t3, out=t9)", "seen = t2.detach().numpy().shape")
    machine.put("torch.add(t3, t3, out=t2.detach())", kept)
    assert machine.script[-4:] == ["pass", "seen = t2.detach().numpy().shape", "pass", kept]
    assert machine.world.tensors["t4"].shape == (1, 2, 3) and machine.world.tensors["t9"].shape == (3,)
