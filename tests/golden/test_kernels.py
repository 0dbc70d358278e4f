"""The text of kernels, to be read in a diff. ACCEPT_GOLDEN=1 writes the files anew."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kitsune.codegen import render
from tests.codegen.build import build
from tests.codegen.reductions import CASES as REDUCTIONS, draw as drawn
from tests.codegen.samples import SAMPLES, draw
from tests.codegen.windows import pooled
from tests.plan.recorded import plan_of

FOLDER = Path(__file__).parent / "kernels"
HALF = torch.bfloat16
aten = torch.ops.aten


def half(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=HALF)


CASES: dict[str, tuple[Callable[..., Any], list[torch.Tensor]]] = {
    "add_relu": (lambda x, y: torch.relu(x + y), [torch.zeros(64), torch.zeros(64)]),
    "add_relu_bf16": (lambda x, y: torch.relu(x + y), [half(64), half(64)]),
    "bias_gelu": (lambda x, b: torch.nn.functional.gelu(x + b, approximate="tanh"), [half(8, 64), half(64)]),
    "transposed": (torch.mul, [torch.zeros(5, 7), torch.zeros(7, 5).t()]),
    "channels_last": (torch.add, [torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last), torch.zeros(3, 1, 1)]),
    "one_number": (torch.mul, [torch.zeros(64), torch.zeros(())]),
    "mask": (lambda x, m: x.masked_fill(m, float("-inf")), [half(64), torch.zeros(64, dtype=torch.bool)]),
    "compare": (lambda x: (x > 0.5) & (x == x), [half(64)]),
    "cast": (lambda x: x.to(HALF).float().to(torch.int8), [torch.zeros(64)]),
    "pow_that_moves": (lambda x: x**1.5, [half(64)]),
    "integers": (lambda x, y: x // y + x % y, [torch.ones(64, dtype=torch.int64), torch.ones(64, dtype=torch.int64)]),
    "tanh_backward_bf16": (aten.tanh_backward, [half(64), half(64)]),
    "silu_backward": (aten.silu_backward, [torch.zeros(64), torch.zeros(64)]),
    "silu_mul_bf16": (lambda x, y: torch.nn.functional.silu(x) * y, [half(8, 64), half(8, 64)]),
    "residual_of_scale": (lambda x, y, s: x + y * s, [half(8, 64), half(8, 64), half(64)]),
    "dropout_backward": (lambda g, m: aten.native_dropout_backward(g, m, 1.25), [half(64), torch.ones(64, dtype=torch.bool)]),
    "relu_backward": (lambda g, y: aten.threshold_backward(g, y, 0), [half(64), half(64)]),
    "where_and_clamp": (lambda x, y: torch.where(x > y, x, 0.5).clamp(-1, 1), [torch.zeros(64), torch.zeros(64)]),
    "running_mean": (lambda m, x: m.lerp_(x, 0.1), [torch.zeros(64), torch.zeros(64)]),
    "division": (lambda x, y: (x / y, x / 1.1, torch.rsqrt(y)), [half(64), half(64)]),
    "logarithms": (lambda x: torch.log1p(x) + torch.logaddexp(x, -x), [torch.zeros(64)]),
    "double": (lambda x, y: x.sin() * y.expm1(), [torch.zeros(64, dtype=torch.float64), torch.zeros(64, dtype=torch.float64)]),
    "three_dimensions": (torch.mul, [torch.zeros(4, 5, 6).transpose(0, 1), torch.zeros(6, 4, 5).permute(2, 1, 0)[..., :1]]),
    "ema_of_parameters": (lambda e, p: torch._foreach_lerp_([e], [p], 0.01) or e, [torch.zeros(64), torch.zeros(64)]),
    "sgd": (lambda p, g: torch._foreach_add_([p], [g], alpha=-0.1) or p, [torch.zeros(64), torch.zeros(64)]),
}

# Of the cases that reductions are tested with, and how long a row is: the longest is gone through in loops, the others are held.
ROWS = {
    "sum": 1023,
    "sum of columns": 1023,
    "amax and amin": 1023,
    "argmax and argmin": 1023,
    "var and mean": 1023,
    "norm": 1023,
    "softmax": 1023,
    "softmax backward": 1023,
    "logsumexp": 1023,
    "cross entropy in float32": 1023,
    "layer norm of a sum": 1023,
    "layer norm backward, all": 1023,
    "batch norm": 1023,
    "batch norm in channels-last": 1023,
    "log_softmax": 50257,
}
WINDOWS = {"pooling": False, "pooling_channels_last": True}


def check(name: str, text: str) -> None:
    path = FOLDER / f"{name}.py.expected"
    if os.environ.get("ACCEPT_GOLDEN"):
        path.write_text(text)
    assert path.exists() and path.read_text() == text, "run once with ACCEPT_GOLDEN=1 and read the diff"


@pytest.mark.parametrize("name", CASES)
def test_kernel(name: str) -> None:
    call, inputs = CASES[name]
    check(name, render(build(call, inputs, name, (1.5, 0.5, -0.1)).kernel).text)


def text_of(program: Callable[..., Any], inputs: list[torch.Tensor]) -> str:
    """All kernels that the planner makes of a program."""
    plan = plan_of(lambda: program(*inputs), numerics="strict")
    return "\n".join(render(kernel).text for launch in plan.launches for kernel in launch.kernels)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.usefixtures("afresh")
def test_kernels_with_reductions(name: str) -> None:
    (case,) = (case for case in REDUCTIONS if case.name == name)
    inputs = drawn(case.shapes(ROWS[name]), HALF)
    check(name.replace(",", "").replace(" ", "_").replace("-", "_"), text_of(case.program, inputs))


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.usefixtures("afresh")
def test_kernels_of_windows(name: str) -> None:
    program = pooled(((3, 3), (2, 2), (1, 1), False), WINDOWS[name])
    check(name, text_of(program, [half(2, 16, 9, 11), half(4 * 2 * 16 * 9 * 11 + 64)]))


@pytest.mark.parametrize("batched", [False, True])
def test_fused_adamw(batched: bool) -> None:
    sample = next(s for s in SAMPLES if s.rule == "_fused_adamw_")
    name = "adamw_batched" if batched else "adamw"
    check(name, render(build(sample.call, draw(sample, HALF, (64,)), name, sample.moving).kernel, batched).text)
