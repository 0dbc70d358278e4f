"""Run in a process of its own, for Triton's interpreter must be chosen before Triton is imported: prints a line per difference,
then the number of kernels that were run.

Usage: python -m tests.codegen.interpret_layouts <folder for sources>
"""

from __future__ import annotations

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import tests.conftest  # noqa: F401  (it sets what tests share)

from kitsune.backends import program_of  # isort: skip
from kitsune.codegen import Compiler
from kitsune.ir import Launch
from kitsune.planning import Planner
from kitsune.runtime.kernel_launch import PreparedLaunch
from tests.plan.test_channels_last import Block, step
from tests.plan.test_joining import gradients, kernels
from tests.plan.test_padding import COSTS, vocabulary
from tests.plan.test_patches import stem
from tests.runtime.checked import record
from tests.runtime.in_double import assert_as_good, in_double, replayed, run_by_plan

PROGRAMS = {
    "vocabulary": vocabulary,
    "block": step(Block(), 4, 3, 8, 8),
    "gradients": gradients,
    "kernels": kernels,
    "patches": stem(),
}


def main(folder: str) -> None:
    """Each program by plan, where reductions are in kernels, too."""
    compiler, n_kernels = Compiler(folder, interpret=True), 0

    def start(launch: Launch) -> PreparedLaunch:
        return PreparedLaunch(launch, program_of(launch), compiler)

    for name, program in PROGRAMS.items():
        graph, values, scalars = record(program, warmup=1)
        plan = Planner(COSTS, verify=True, numerics="strict").plan(graph)
        n_kernels += sum(bool(launch.kernels) for launch in plan.launches)
        exact, eager = in_double(graph, values, scalars), replayed(graph, values, scalars)
        try:
            assert_as_good(graph, exact, eager, run_by_plan(plan, values, scalars, start))
        except AssertionError as error:
            print(f"{name}: {error}")
    print(n_kernels)


if __name__ == "__main__":
    main(sys.argv[1])
