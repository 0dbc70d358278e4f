"""Run in a process of its own, for Triton's interpreter must be chosen before Triton is imported: prints a line per difference,
then the number of kernels that were run.

Usage: python -m tests.codegen.interpret_reductions <folder for sources> <float32 | ... | layouts | special | batched | gathered>
A dtype stands for every case of the table in all sizes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import tests.conftest  # noqa: F401  (it sets what tests share)

import torch  # isort: skip

from kitsune.backends import program_of
from kitsune.codegen import Compiler, tiles
from kitsune.ir import Launch
from kitsune.runtime.kernel_launch import PreparedLaunch
from kitsune.scheduler import cost
from tests.codegen.known import is_known
from tests.codegen.memory_check import watch
from tests.codegen.reductions import (
    CASES,
    DTYPES,
    SIZES,
    differs,
    draw,
    exactly,
    gathered,
    layouts,
    numbers_of_special,
    of_special,
    rows_of_special,
    special,
    tensors,
)
from tests.runtime.planned import planned

n_kernels = n_gathered = 0


def compare(
    name: str,
    program: Callable[..., Any],
    inputs: Sequence[torch.Tensor],
    compiler: Compiler,
    precision: torch.dtype | None = None,
) -> None:
    """Run a program by plan, eagerly and in float64."""
    global n_gathered, n_kernels

    def start(launch: Launch) -> PreparedLaunch | None:
        text = program_of(launch)
        return None if is_known(launch, text) else PreparedLaunch(launch, text, compiler)

    found, plans = planned(lambda: tensors(program(*inputs)), start)
    n_kernels += sum(bool(launch.kernels and launch.kernels[0].reduced) for plan in plans for launch in plan.launches)
    n_gathered += sum(bool(launch.kernels and launch.kernels[0].gathered) for plan in plans for launch in plan.launches)
    eager, exact = tensors(program(*inputs)), exactly(program, inputs)
    for k, (a, b, c) in enumerate(zip(found, eager, exact, strict=True)):
        if difference := differs(a.detach() * 1, b, c, precision):
            print(f"{name}, result {k}: {difference}")


def sizes(dtype: torch.dtype, compiler: Compiler) -> None:
    for case in CASES:
        # A text does not depend on the size: what is nearly a block, and what is large, in one dtype each.
        large = [case.large] if case.large and dtype is torch.bfloat16 else []
        for n in (*(n for n in SIZES[:-1] if n != 31 or dtype is torch.float32), *large):
            precision = dtype if case.rounds else None
            compare(f"{case.name} {n} {dtype}", case.program, draw(case.shapes(n), dtype), compiler, precision)


def views(compiler: Compiler) -> None:
    for dtype in DTYPES:
        for name, program, inputs in layouts(dtype):
            compare(f"{name} {dtype}", program, inputs, compiler)


def specials(compiler: Compiler) -> None:
    for dtype in DTYPES:
        compare(f"special 33 {dtype}", of_special, [special(dtype, 33)], compiler)
        compare(f"special 5000 {dtype}", numbers_of_special, [special(dtype, 5000)], compiler)
    compare("special 16500", rows_of_special, [special(torch.float32, 16500)], compiler)


def batched(compiler: Compiler) -> None:
    for dtype in DTYPES[:2]:
        x, y = draw([(2048, 48), (1024, 48)], dtype)
        compare(f"batched {dtype}", lambda x, y: [x.sum(0), y.sum(0)], [x, y], compiler)


def in_turn(compiler: Compiler) -> None:
    """Rows that blocks go through in turn, in so few blocks that each has many, and the last one fewer than the others."""
    cost.BESIDE, cost.ONE_BLOCK, tiles.ENOUGH = 1, 0, 1
    for dtype in DTYPES[:2]:
        for name, program, inputs in gathered(dtype):
            before = n_gathered
            compare(f"{name} {dtype}", program, inputs, compiler)
            if n_gathered == before:
                print(f"{name} {dtype}: no kernel adds up rows in turn")


if __name__ == "__main__":
    check = watch()
    by_dtype = {str(dtype).removeprefix("torch."): partial(sizes, dtype) for dtype in DTYPES}
    {**by_dtype, "layouts": views, "special": specials, "batched": batched, "gathered": in_turn}[sys.argv[2]](
        Compiler(sys.argv[1], interpret=True)
    )
    print(*check.found, n_kernels, sep="\n")
