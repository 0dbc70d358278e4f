"""Regions run by plan on the CPU through the real Runner: a Backend of ours takes the place of the one for a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kitsune
from kitsune.backends import Backend, program_of
from kitsune.codegen import Compiler
from kitsune.ir import Launch
from kitsune.runtime.kernel_launch import PreparedLaunch
from tests.runtime.checked import forget
from tests.runtime.test_real_plans import Walk


@contextlib.contextmanager
def backend(prepare_launch: Callable[[Launch], Any] = Walk, arch: str = "sm_90") -> Iterator[None]:
    """New pipelines have this backend."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kitsune.running.backend_of", lambda device: Backend(arch, prepare_launch))
        forget()
        yield
    forget()


def compiled_in(folder: Any) -> Callable[[Launch], PreparedLaunch]:
    """Kernels that cannot be compiled: their Triton is for GPUs, and there is none."""
    compiler = Compiler(folder)
    return lambda launch: PreparedLaunch(launch, program_of(launch), compiler)


def lazily(**options: Any) -> Any:
    """The context of the programs here."""
    return kitsune.accelerate(**{"warmup": 0, "device": "cpu", **options})


def chain() -> torch.Tensor:
    """A few ops that make one kernel."""
    x = torch.arange(24.0).view(4, 6)
    return ((x + 1) * 0.5 - x).abs()


def runner() -> Any:
    """The Runner of this thread's only pipeline."""
    (pipeline,) = kitsune.session._thread.pipelines.values()
    return pipeline.runner


def small_training() -> tuple[nn.Module, torch.optim.Optimizer, torch.Tensor, torch.Tensor]:
    """A model with dropout, its optimizer, and a batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Dropout(0.2), nn.Linear(16, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=True)
    return model, optimizer, torch.randn(8, 6), torch.arange(8) % 3


def loop(context: Any, steps: int = 4) -> list[torch.Tensor]:
    """What training leaves: losses, parameters, gradients and the optimizer's state."""
    model, optimizer, x, target = small_training()
    losses = []
    with context:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), target)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            losses.append(loss.detach())
    state = [value for entry in optimizer.state.values() for value in entry.values()]
    return [*losses, *model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None), *state]


def update(loss: torch.Tensor, optimizer: Any, schedule: Any, step: int, how: dict[str, Any]) -> None:
    """The end of a step of a loop. Gradients of `every` so many steps are added up, and kept after an update if not `zero`."""
    every = how.get("every", 1)
    (loss / every).backward()
    if (step + 1) % every == 0:
        optimizer.step()
        schedule.step()
        if how.get("zero", True):
            optimizer.zero_grad()


def assert_equal(got: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(got) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def look_up(index: int) -> torch.Tensor:
    """An op that fails when it is run if the index is 3 or more."""
    return F.embedding(torch.full((1,), index), torch.ones(3, 2)) * 2


def know_look_up() -> None:
    """An op that takes several dtypes is made at once when it is first seen."""
    with lazily():
        look_up(1)
