"""Run in a process of its own, for Triton's interpreter must be chosen before Triton is imported: raises at a difference.

Usage: python -m tests.property.executors <folder for sources> <number of programs>
"""

from __future__ import annotations

import os
import sys
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import pytest
from hypothesis import given, settings, strategies as st

import kitsune
import tests.conftest  # noqa: F401  (it makes hypothesis repeatable)
from kitsune.backends import program_of
from kitsune.codegen import Compiler
from kitsune.ir import Launch
from kitsune.planning import plan_for
from kitsune.runtime.kernel_launch import PreparedLaunch
from kitsune.scheduler import Costs
from tests.property.exact_steps import EXACT, begin
from tests.property.strategies import programs
from tests.property.test_executors import FUEL, other_numbers
from tests.property.test_programs import SLOW
from tests.property.world import Program
from tests.runtime.checked import checked

# (kernels planned, kernels started) of all programs
counts = [0, 0]


class Started(PreparedLaunch):
    """Counts its starts."""

    def start(self, *args: Any) -> None:
        super().start(*args)
        counts[1] += 1


def compare(compiler: Compiler, examples: int) -> None:
    """Run programs by plan and by replay."""

    def start(launch: Launch) -> PreparedLaunch:
        return Started(launch, program_of(launch), compiler)

    @settings(SLOW, max_examples=examples)
    @given(program=programs(16, EXACT, begin), alone=st.booleans(), fuel=FUEL)
    def check(program: Program, alone: bool, fuel: int | None) -> None:
        with pytest.MonkeyPatch.context() as patch, kitsune.config.patch(fuel=fuel):
            if alone:
                patch.setattr(Costs, "alone", lambda *_: True)
            with checked(patch, start=start, plan=plan_for) as it:
                for variant in (program, program, other_numbers(program)):  # at first, some ops are made at once
                    variant.run(kitsune.accelerate(warmup=0, device="cpu"))
        assert not it.wrong, it.wrong[0]
        assert not it.told, it.told[0]
        counts[0] += it.n_kernels

    check()


if __name__ == "__main__":
    compare(Compiler(sys.argv[1], interpret=True), int(sys.argv[2]))
    print(*counts)
