"""Cold start on a GPU: nothing is compiled or planned on the program's thread, and in the end all is fused and captured."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import kitsune
from kitsune.codegen import compiler as compiler_module
from kitsune.config import config
from tests.runtime.checked import forget
from tests.runtime.repeated import counts
from tests.runtime.test_capture_cuda import convolutions, mlp, train, transformer

pytestmark = pytest.mark.gpu
SECONDS = 120.0


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """Nothing is cached. Gives the names of the threads that brought machine code to the device, or compiled it here."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    torch.use_deterministic_algorithms(True, warn_only=True)
    asked: list[str] = []

    def watched(call: Any) -> Any:
        def watching(*args: Any) -> Any:
            asked.append(threading.current_thread().name)
            return call(*args)

        return watching

    for name in ("LoadedKernel", "compile_binary"):
        monkeypatch.setattr(compiler_module, name, watched(getattr(compiler_module, name)))
    forget()
    with config.patch(cache_dir=str(tmp_path / "kernels"), compile_workers=2), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield asked
    kitsune.wait_for_kernels(SECONDS)
    forget()
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("make", [mlp, convolutions, transformer])
def test_first_steps_compile_nothing_and_later_ones_are_fused_and_captured(make: Any, threads: list[str]) -> None:
    expected = train(contextlib.nullcontext(), make)
    first = train(kitsune.accelerate(), make)
    assert all(map(torch.equal, first, expected)), kitsune.counters()
    assert counts("unfused")[0] > 0 and not kitsune.explain().mended
    assert kitsune.wait_for_kernels(SECONDS)
    # A step that is followed keeps less alive than one that is recorded: its regions are new ones, once.
    for _ in range(2):
        assert all(map(torch.equal, train(kitsune.accelerate(), make), expected)), kitsune.counters()
        assert kitsune.wait_for_kernels(SECONDS)
    assert all(map(torch.equal, train(kitsune.accelerate(), make), expected)), kitsune.counters()
    kernels, unfused, replayed = counts("kernels", "unfused", "replayed")
    assert kernels > 0
    assert all(map(torch.equal, train(kitsune.accelerate(), make), expected)), kitsune.counters()
    assert counts("unfused") == [unfused], "a region went back to unfused"
    assert counts("replayed")[0] > replayed and not counts("graph_refused")[0] and counts("compiling") == [0]
    assert threads and set(threads) == {"kitsune-background"}
    assert not kitsune.explain().mended


def test_kernels_that_arrive_in_the_middle_of_a_training_change_no_bit() -> None:
    expected = train(contextlib.nullcontext(), steps=200)
    got = train(kitsune.accelerate(), steps=200)
    assert len(got) == len(expected) and all(map(torch.equal, got, expected)), kitsune.counters()


def test_what_stays_is_replayed_before_its_kernels_are_there() -> None:
    x, w = torch.randn(64, 64, device="cuda"), torch.randn(64, 64, device="cuda")

    def step() -> torch.Tensor:
        with kitsune.accelerate(warmup=0):
            return ((x @ w + 1) * 0.5).abs().sum()

    expected = step()
    for _ in range(3):
        assert torch.equal(step(), expected)
    # A few ms after the first step: no compiler was that quick.
    assert counts("replayed")[0] > 0 and counts("kernels") == [0]
    assert kitsune.wait_for_kernels(SECONDS)
    for _ in range(4):
        assert torch.equal(step(), expected)
    assert counts("captured") == [2] and counts("kernels")[0] > 0


def test_what_lies_on_disk_is_not_loaded_by_the_program_either(threads: list[str]) -> None:
    train(kitsune.accelerate())
    assert kitsune.wait_for_kernels(SECONDS)
    forget()
    train(kitsune.accelerate())
    assert kitsune.wait_for_kernels(SECONDS)
    assert set(threads) == {"kitsune-background"} and not kitsune.explain().mended
