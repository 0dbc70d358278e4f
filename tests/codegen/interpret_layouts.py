"""Run in a process of its own, for Triton's interpreter must be chosen before Triton is imported: prints a line per difference,
then the number of kernels that were run.

Usage: python -m tests.codegen.interpret_layouts <folder for sources>
"""

from __future__ import annotations

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import tests.conftest  # noqa: F401  (it sets what tests share)

import torch  # isort: skip

import kitsune.scheduler.cost
from kitsune.backends import program_of
from kitsune.codegen import Compiler
from kitsune.ir import Kind, Launch
from kitsune.planning import Planner
from kitsune.runtime.kernel_launch import PreparedLaunch
from tests.codegen.memory_check import watch
from tests.plan.test_channels_last import Block, step
from tests.plan.test_joining import gradients, kernels
from tests.plan.test_padding import COSTS, vocabulary
from tests.plan.test_patches import stem
from tests.runtime.checked import record
from tests.runtime.in_double import assert_as_good, in_double, replayed, run_by_plan

IMAGES = torch.linspace(-2, 2, 4 * 24 * 48).sin().view(4, 24, 6, 8).to(torch.bfloat16, memory_format=torch.channels_last)
NUMBERS = [torch.linspace(1, 2, 24).mul(k).cos().view(24, 1, 1) for k in range(1, 5)]


def channels() -> torch.Tensor:
    """What a norm does with each channel of images, and the images again."""
    a, b, c, d = NUMBERS
    images = IMAGES * 1
    return ((images - a) * b * c + d).to(torch.bfloat16).add_(images).relu_()


def planes() -> torch.Tensor:
    """The same of contiguous images, whose planes are rows of neighbours."""
    a, b, c, d = NUMBERS
    images = torch.linspace(-2, 2, 2 * 24 * 17 * 17).sin().view(2, 24, 17, 17).to(torch.bfloat16)
    return ((images - a) * b * c + d).to(torch.bfloat16).relu_()


PROGRAMS = {
    "vocabulary": vocabulary,
    "block": step(Block(), 4, 3, 8, 8),
    "gradients": gradients,
    "kernels": kernels,
    "patches": stem(),
    "channels": channels,
    "planes": planes,
}


def in_rows_alone(launch: Launch) -> bool:
    """Rows without a reduction: what is broadcast along them is kept."""
    return any(k.reduced and all(step.op.kind is Kind.POINTWISE for step in k.steps) for k in launch.kernels)


def main(folder: str) -> None:
    """Each program by plan, where reductions are in kernels, too."""
    kitsune.scheduler.cost.BROADCAST_BYTES = 0
    check, compiler, n_kernels, n_in_rows = watch(), Compiler(folder, interpret=True), 0, 0

    def start(launch: Launch) -> PreparedLaunch:
        return PreparedLaunch(launch, program_of(launch), compiler)

    for name, program in PROGRAMS.items():
        graph, values, scalars = record(program, warmup=1)
        plan = Planner(COSTS, verify=True, numerics="strict").plan(graph)
        n_kernels += sum(bool(launch.kernels) for launch in plan.launches)
        n_in_rows += sum(map(in_rows_alone, plan.launches))
        exact, eager = in_double(graph, values, scalars), replayed(graph, values, scalars)
        try:
            assert_as_good(graph, exact, eager, run_by_plan(plan, values, scalars, start))
        except AssertionError as error:
            print(f"{name}: {error}")
    print("".join(f"{told}\n" for told in check.found), end="")
    print(n_kernels if n_in_rows == 2 else f"of channels and planes, {n_in_rows} are in rows")


if __name__ == "__main__":
    main(sys.argv[1])
