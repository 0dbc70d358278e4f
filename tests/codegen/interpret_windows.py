"""Run in a process of its own, for Triton's interpreter must be chosen before Triton is imported: prints a line per difference,
then the number of kernels over windows that were run.

Usage: python -m tests.codegen.interpret_windows <folder for sources>
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
from kitsune.runtime.kernel_launch import PreparedLaunch
from tests.codegen.known import is_known
from tests.codegen.memory_check import watch
from tests.codegen.windows import cases, differs
from tests.runtime.planned import planned


def main(folder: str) -> None:
    """Each case by plan, however small."""
    kitsune.scheduler.cost.WINDOW_BYTES = 0
    check, compiler, n_kernels = watch(), Compiler(folder, interpret=True), 0

    def start(launch: Launch) -> PreparedLaunch | None:
        text = program_of(launch)
        return None if is_known(launch, text) else PreparedLaunch(launch, text, compiler)

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for name, program, inputs in cases(dtype):
            found, plans = planned(lambda program=program, inputs=inputs: program(*inputs), start)
            n_kernels += sum(op.kind is Kind.WINDOW for plan in plans for launch in plan.launches for op in launch.ops)
            exact = program(*(t.double() for t in inputs))
            if difference := differs([t.detach() * 1 for t in found], program(*inputs), exact):
                print(f"{name}: {difference}")
    print(*check.found, n_kernels, sep="\n")


if __name__ == "__main__":
    main(sys.argv[1])
