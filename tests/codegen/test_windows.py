"""Pooling in kernels: equal to eager, in vectors, one text for all sizes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import kitsune
import kitsune.scheduler.cost as cost
from kitsune.codegen import Compiler, parameters_of, render, text_key, why_not_batched
from kitsune.config import config
from kitsune.ir import Kernel, Kind, Plan
from kitsune.planning import planner_for
from tests.codegen.build import compiled_kernel
from tests.codegen.test_compiled import vectorised
from tests.codegen.windows import cases, differs, pooled
from tests.plan.recorded import launched, plan_of, recorded_again

pytest.importorskip("triton")
RESNET = ((3, 3), (2, 2), (1, 1), False)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cost, "WINDOW_BYTES", 0)
    kitsune.reset()
    yield
    kitsune.reset()


def plan_for(shape: tuple[int, ...], options: tuple = RESNET, numerics: str = "strict") -> Plan:
    x, grad = torch.zeros(shape, dtype=torch.bfloat16), torch.zeros(4 * 2 * torch.Size(shape).numel(), dtype=torch.bfloat16)
    return plan_of(lambda: pooled(options, True)(x, grad), numerics=numerics)


def kernels(plan: Plan) -> list[Kernel]:
    return [k for launch in plan.launches for k in launch.kernels if k.steps[0].op.kind is Kind.WINDOW]


@pytest.mark.timeout(300)
def test_pooling_computes_what_aten_does(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.codegen.interpret_windows", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) == 2 * 7 * 2 * 3, done.stdout[:4000]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_pooling_computes_what_eager_does(dtype: torch.dtype, tmp_path: Path) -> None:
    wrong = []
    with config.patch(cache_dir=str(tmp_path), numerics="strict", compile_workers=0):
        for name, program, inputs in cases(dtype):
            inputs = [t.cuda() for t in inputs]
            kitsune.reset()
            for _ in range(2):  # at first, some ops are made at once
                with kitsune.accelerate(warmup=0, device="cuda"):
                    found = program(*inputs)
            assert kitsune.counters()["kernels"] and not kitsune.explain().mended
            exact = program(*(t.double() for t in inputs))
            if difference := differs([t.detach() * 1 for t in found], program(*inputs), exact):
                wrong.append((name, difference))
    assert not wrong


def test_other_sizes_have_the_same_text_and_other_windows_another() -> None:
    first, second = kernels(plan_for((2, 16, 8, 10))), kernels(plan_for((4, 32, 14, 7)))
    assert [render(k).text for k in first] == [render(k).text for k in second]
    assert list(map(text_key, first)) == list(map(text_key, second))
    for options in (((2, 2), (2, 2), (1, 1), False), ((3, 3), (1, 1), (1, 1), False), ((3, 3), (2, 2), (0, 1), False)):
        others = kernels(plan_for((2, 16, 8, 10), options))
        for k, other in zip(first, others, strict=True):
            assert text_key(k) != text_key(other) and render(k).text != render(other).text


def test_images_in_channels_last_are_read_in_vectors(tmp_path: Path) -> None:
    for kernel in kernels(plan_for((2, 16, 8, 10))):
        assert vectorised(compiled_kernel(Compiler(tmp_path), render(kernel), 90).asm["ptx"])
        assert why_not_batched(kernel) == "it is over windows"


def test_nothing_joins_a_window_and_bitwise_leaves_it_to_the_library() -> None:
    assert [name for name in launched(plan_for((2, 16, 8, 10))) if "pool" in name] == [
        "max_pool2d_with_indices",
        "max_pool2d_with_indices_backward",
    ]
    assert not kernels(plan_for((2, 16, 8, 10), numerics="bitwise"))


def test_an_image_is_counted_as_a_whole() -> None:
    forward, backward = kernels(plan_for((2, 16, 8, 10)))
    pixels, windows = 2 * 16 * 80, 2 * 16 * 20
    assert forward.nbytes == 2 * pixels + (2 + 8) * windows and backward.nbytes == (2 + 8) * windows + 2 * pixels


def test_where_only_deterministic_algorithms_are_allowed_eager_has_its_say() -> None:
    """Its backward raises then."""
    torch.use_deterministic_algorithms(True)
    try:
        planner = planner_for("sm_90", numerics="strict")
    finally:
        torch.use_deterministic_algorithms(False)
    graph = recorded_again(lambda: pooled(RESNET, True)(torch.zeros(2, 16, 8, 10), torch.zeros(9999)))
    assert not kernels(planner.plan(graph)) and kernels(planner_for("sm_90", numerics="strict").plan(graph))


def test_images_of_two_sizes_with_as_many_windows_are_started_with_their_own() -> None:
    """Of 9 rows in memory, 8 or 7 are the image: four windows each, at the same strides."""

    def forward(rows: int) -> Kernel:
        x = torch.zeros(1, 16, 9, 10)[:, :, :rows]
        return kernels(plan_of(lambda: torch.ops.aten.max_pool2d_with_indices(x, (3, 3), (2, 2), (1, 1)), numerics="strict"))[0]

    first, second = forward(8), forward(7)
    assert (first.domain, [a.strides for a in first.loads]) == (second.domain, [a.strides for a in second.loads])
    assert parameters_of(first) != parameters_of(second) and text_key(first) == text_key(second)


def test_small_images_and_gaps_are_the_librarys(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(2, 4, 8, 8)
    gaps = plan_of(lambda: torch.ops.aten.max_pool2d_with_indices(x * 1, (2, 2), (2, 2), (0, 0), (2, 2)), numerics="strict")
    assert not kernels(gaps)
    monkeypatch.setattr(cost, "WINDOW_BYTES", 16 << 20)
    assert not kernels(plan_for((2, 16, 8, 10)))
