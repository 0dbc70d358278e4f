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
from tests.codegen.samples import SAMPLES, draw

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
    "sgd": (lambda p, g: torch._foreach_add_([p], [g], alpha=-0.1) or p, [torch.zeros(64), torch.zeros(64)]),
}


def check(name: str, text: str) -> None:
    path = FOLDER / f"{name}.py.expected"
    if os.environ.get("ACCEPT_GOLDEN"):
        path.write_text(text)
    assert path.exists() and path.read_text() == text, "run once with ACCEPT_GOLDEN=1 and read the diff"


@pytest.mark.parametrize("name", CASES)
def test_kernel(name: str) -> None:
    call, inputs = CASES[name]
    check(name, render(build(call, inputs, name, (1.5, 0.5, -0.1)).kernel).text)


@pytest.mark.parametrize("batched", [False, True])
def test_fused_adamw(batched: bool) -> None:
    sample = next(s for s in SAMPLES if s.rule == "_fused_adamw_")
    name = "adamw_batched" if batched else "adamw"
    check(name, render(build(sample.call, draw(sample, HALF, (64,)), name, sample.moving).kernel, batched).text)
