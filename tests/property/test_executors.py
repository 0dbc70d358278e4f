"""Programs of exact ops give the same bits by replay and by plan: kernels in Triton's interpreter, and on a GPU."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st

import kitsune
from kitsune.config import config
from kitsune.scheduler import Costs
from tests.property.exact_steps import EXACT, begin
from tests.property.strategies import Builder, programs
from tests.property.test_programs import SLOW
from tests.property.world import Program, World, differences
from tests.runtime.checked import forget

pytest.importorskip("triton")

EXAMPLES = settings().max_examples
# The numbers that move, and what another run of a program has instead.
OTHERS = {"s = 0.375": "s = 1.5", "r = -1.75": "r = 0.625"}
FUEL = st.one_of(st.none(), st.none(), st.integers(0, 9))


def other_numbers(program: Program) -> Program:
    """The same program with other values of the numbers that move."""
    return Program([OTHERS.get(line, line) for line in program.outside], program.inside)


def test_plans_in_the_interpreter_give_the_bits_of_replay(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.property.executors", str(tmp_path), str(EXAMPLES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    planned, started = map(int, done.stdout.split())
    assert planned > 2 * EXAMPLES, "most programs have kernels"
    assert started > planned, "a region that comes back starts its kernels again"


@pytest.mark.parametrize("name", sorted(name for name in EXACT if not name[-1].isdigit()))
def test_every_exact_step_succeeds_somewhere(name: str) -> None:
    seen = []
    for i in range(20):
        builder = Builder()
        begin(builder, i)
        builder.add(EXACT[name](builder, i, i + 1, i), builder.program.inside)
        seen.append(builder.world.seen[-1])
    assert sum("Error at" not in line for line in seen) >= 10, seen


def on_gpu(program: Program) -> Program:
    return Program([line.replace("D = 'cpu'", "D = 'cuda'") for line in program.outside], program.inside)


def run(program: Program, fuse: bool) -> World:
    with config.patch(fuse=fuse):
        return program.run(kitsune.accelerate(warmup=0, device="cuda"))


@pytest.fixture
def own_cache(tmp_path: Path) -> Iterator[None]:
    """Kernels are compiled anew, and nothing is left of them."""
    forget()
    with config.patch(cache_dir=str(tmp_path)):
        yield
    forget()


@pytest.mark.gpu
@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("alone", [False, True], ids=["as planned", "single ops as kernels"])
def test_plans_on_a_gpu_give_the_bits_of_replay(alone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    kernels = [0]
    if alone:
        monkeypatch.setattr(Costs, "alone", lambda *_: True)

    @settings(SLOW, max_examples=max(30, EXAMPLES // 4))
    @given(program=programs(16, EXACT, begin), fuel=FUEL)
    def check(program: Program, fuel: int | None) -> None:
        kitsune.reset()
        with config.patch(fuel=fuel):
            for variant in map(on_gpu, (program, program, other_numbers(program))):
                expected, got = run(variant, fuse=False), run(variant, fuse=True)
                assert not (found := differences(expected, got)), found
        assert not (mended := kitsune.explain().mended), mended
        kernels[0] += kitsune.counters()["kernels"]

    check()
    assert kernels[0] > 60
