"""Run in a process of its own, for Triton's interpreter must be chosen before Triton is imported: raises at a difference.

Random programs of reductions and what may be fused with them, by plan: as near to float64 as eager is, and a little.

Usage: python -m tests.property.reductions <folder for sources> <number of programs>
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import tests.conftest  # noqa: F401  (it makes hypothesis repeatable)

import torch  # isort: skip
from hypothesis import given, settings, strategies as st

from kitsune.backends import program_of
from kitsune.codegen import Compiler
from kitsune.ir import Launch
from kitsune.runtime.kernel_launch import PreparedLaunch
from tests.behind import behind
from tests.property.test_programs import SLOW
from tests.runtime.planned import planned

Tensors = list[torch.Tensor]
# Of the operands and of the shape of what they make nothing is asked but that they can be broadcast. None amplifies an error.
STEPS: dict[str, Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]] = {
    "tanh": lambda x, y, d: x.tanh(),
    "half": lambda x, y, d: x * 0.5 + 0.25,
    "add": lambda x, y, d: x + y,
    "mul": lambda x, y, d: x.tanh() * y.tanh(),
    "where": lambda x, y, d: torch.where(x.detach() * 0 == 0, y, x),
    "sum": lambda x, y, d: x.sum(d, keepdim=True) / x.shape[d],
    "mean": lambda x, y, d: x.mean(d, keepdim=True),
    "mean of all": lambda x, y, d: x.mean(),
    "amax": lambda x, y, d: x.amax(d, keepdim=True),
    "amin of all": lambda x, y, d: x.amin(),
    "var": lambda x, y, d: x.tanh().var(d, correction=0, keepdim=True),
    "norm": lambda x, y, d: torch.linalg.vector_norm(x, dim=d, keepdim=True) / x.shape[d],
    "softmax": lambda x, y, d: x.softmax(d),
    "log_softmax": lambda x, y, d: x.log_softmax(d) * 0.125,
    "centre": lambda x, y, d: x - x.mean(d, keepdim=True),
    "squeezed": lambda x, y, d: x.sum(1) / x.shape[1] if x.dim() == 2 else x,
    "transposed": lambda x, y, d: x.t().contiguous().t() if x.dim() == 2 else x,
    "in place": lambda x, y, d: (x * 1).add_(x.mean(d, keepdim=True)).mul_(0.5),
}
Step = tuple[str, int, int, int]
PROGRAMS = st.lists(
    st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 9), st.integers(0, 9), st.integers(0, 1)), min_size=2, max_size=9
)
SHAPES = st.sampled_from([(3, 40), (40, 3), (1, 70), (6, 5000), (2100, 5), (8, 8)])


def run(steps: list[Step], inputs: Tensors) -> Tensors:
    """What a program makes; a step that the shapes do not allow is left out."""
    made = list(inputs)
    for name, i, j, d in steps:
        x, y = made[i % len(made)], made[j % len(made)]
        if x.dim() != 2 and name not in ("tanh", "half", "add", "mul", "where"):
            continue
        try:
            shape = torch.broadcast_shapes(x.shape, y.shape)
        except RuntimeError:
            continue
        if max(shape, default=1) <= 5000 and shape != (5000, 5000):
            made.append(STEPS[name](x, y, d))
    return made[len(inputs) :]


def differs(found: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor) -> bool:
    assert found.shape == eager.shape and found.dtype is eager.dtype
    scale = max(1.0, float(exact.abs().max()))
    allowed = 2 * float((eager - exact).abs().max()) + 64 * torch.finfo(torch.float32).eps * scale
    return not float((found - exact).abs().max()) <= allowed


# Kernels with reductions that were run.
count = [0]


def compare(compiler: Compiler, examples: int) -> None:
    """Run programs by plan, eagerly and in float64."""

    def start(launch: Launch) -> PreparedLaunch:
        count[0] += launch.kernels[0].reduced > 0
        return PreparedLaunch(launch, program_of(launch), compiler)

    @settings(SLOW, max_examples=examples)
    @given(steps=PROGRAMS, shape=SHAPES, seed=st.integers(0, 3))
    def check(steps: Any, shape: tuple[int, int], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        inputs = [behind(torch.randn(s, generator=generator)) for s in (shape, (1, shape[1]))]
        found, _ = planned(lambda: run(steps, inputs), start)
        eager, exact = run(steps, inputs), run(steps, [x.double() for x in inputs])
        for k, (a, b, c) in enumerate(zip(found, eager, exact, strict=True)):
            assert not differs(a.detach() * 1, b, c), f"result {k} of {steps} for {shape}"

    check()


if __name__ == "__main__":
    compare(Compiler(sys.argv[1], interpret=True), int(sys.argv[2]))
    print(*count)
