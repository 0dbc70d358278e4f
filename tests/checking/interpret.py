"""Run in a process of its own, for Triton's interpreter must be chosen before Triton is imported: prints a report.

Usage: python -m tests.checking.interpret <folder for sources> <healthy | off>
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import nn
from torch.nn import functional as F

import kitsune
from kitsune.backends import program_of
from kitsune.codegen import Compiler
from kitsune.ir import Access, Launch
from kitsune.runtime.kernel_launch import PreparedLaunch
from tests.runtime.backends import backend
from tests.runtime.naive import at_address


class Off:
    """Generated kernels, of which those with reductions are off by a thousandth."""

    def __init__(self, launch: Launch, compiler: Compiler, factor: float) -> None:
        self.launch, self.factor = launch, factor
        self.prepared = PreparedLaunch(launch, program_of(launch), compiler)
        self.name = launch.name

    def start(self, address: Callable[[Access], int], scalars: list[float], stream: int) -> None:
        self.prepared.start(address, scalars, stream)
        for kernel in self.launch.kernels if self.factor != 1 else ():
            for access in (store.access for store in kernel.stores if kernel.reduced):
                type_ = access.value.type
                if type_.dtype is torch.float32:
                    at_address(address(access), type_.dtype, type_.shape, type_.stride).mul_(self.factor)


NUMBERS = [torch.linspace(-2, 2, 4096).mul(k).sin().to(torch.bfloat16) for k in (1, 2)]

EAGERS = (NUMBERS[0] * NUMBERS[1] + 1.5) * NUMBERS[1]


def chain() -> list[torch.Tensor]:
    """Three roundings to 16 bits and a choice, in one kernel."""
    x, y = NUMBERS
    z = (x * y + 1.5) * y
    # Of numbers that nobody keeps, eager makes the choice itself.
    results = [z, (y * x + 1.5) * y == EAGERS]
    kitsune.flush()
    return results


def main(folder: str, factor: float) -> None:
    """Train a small model with norms, softmax and a loss for a few steps."""
    compiler = Compiler(folder, interpret=True)
    torch.manual_seed(0)
    # Pointwise, only what the interpreter rounds as the CPU's kernels do: not GELU, for one.
    model = nn.Sequential(nn.Linear(40, 24), nn.LayerNorm(24), nn.ReLU(), nn.Linear(24, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, foreach=True)
    x, target = torch.randn(12, 40), torch.arange(12) % 10

    def step() -> Any:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x).softmax(1), target)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        return loss.detach()

    with backend(lambda launch: Off(launch, compiler, factor)), kitsune.config.patch(numerics="strict", cache_dir=folder):
        report = kitsune.verify(step, steps=4, device="cpu")
        wide = kitsune.verify(chain, steps=4, device="cpu", numerics="strict")
    with backend(lambda launch: Off(launch, compiler, factor)), kitsune.config.patch(numerics="fast", cache_dir=folder):
        fast = kitsune.verify(chain, steps=4, device="cpu")
    print(report.equal, report.rounded, report.kernels, sep="\n")
    print(wide.equal, wide.rounded, fast.equal, fast.rounded)
    print(report)


if __name__ == "__main__":
    main(sys.argv[1], {"healthy": 1.0, "off": 1.001}[sys.argv[2]])
