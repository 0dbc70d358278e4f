"""Operators with schemas: Kitsune registers none, and a program's own pass torch's checks in a context as they do without."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import library

import kitsune

PROGRAM = """
import traceback
import torch
from torch import library
made, init = [], library.Library.__init__
def noted(self, *args, **kwargs):
    made.append((args[0], traceback.extract_stack()[-2].filename))
    init(self, *args, **kwargs)
library.Library.__init__ = noted
import kitsune
layer = torch.nn.Linear(3, 2)
optimizer = kitsune.KitsuneOptimizer(torch.optim.AdamW(layer.parameters()), enable_fusion=True)
with kitsune.accelerate(device="cpu"):
    for _ in range(3):
        layer(torch.ones(2, 3)).sum().backward()
        optimizer.step()
names = {name.partition("::")[0] for name in torch._C._dispatch_get_all_op_names()}
print(*[name for name, file in made if "kitsune" in file], *[name for name in names if "kitsune" in name])
"""


def test_kitsune_registers_no_operator() -> None:
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not done.stdout.split(), "what is registered needs opcheck here"


@pytest.fixture
def scaled() -> Iterator[library.CustomOpDef]:
    @library.custom_op("program::scaled", mutates_args=())
    def scaled(x: torch.Tensor, by: float) -> torch.Tensor:
        return x * by

    scaled.register_fake(lambda x, by: torch.empty_like(x))
    scaled.register_autograd(
        lambda ctx, grad: (grad * ctx.by, None), setup_context=lambda ctx, inputs, output: setattr(ctx, "by", inputs[1])
    )
    yield scaled


def test_a_programs_own_operator_passes_torchs_checks_in_a_context(scaled: library.CustomOpDef) -> None:
    args = (torch.randn(3, requires_grad=True), 2.5)
    alone = library.opcheck(scaled, args)
    assert len(alone) == 4 and set(alone.values()) == {"SUCCESS"}
    for warmup in (0, 1):
        with kitsune.accelerate(warmup=warmup, device="cpu"):
            assert library.opcheck(scaled, args) == alone
