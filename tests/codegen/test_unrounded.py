"""numerics="fast": 16-bit values are rounded when they are stored or decide something, and not between the ops of a kernel.

What such a kernel computes is looked at by tests/codegen/interpret.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import kitsune
from kitsune.codegen import Compiler, render, text_key
from kitsune.ir import Kernel
from tests.codegen.build import compiled_kernel
from tests.plan.recorded import plan_of, reasons

N = 1 << 16
BF16 = [torch.ones(N, dtype=torch.bfloat16) for _ in range(2)]
FP32 = [torch.ones(N) for _ in range(2)]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    kitsune.reset()
    yield


def only(program: Callable[..., Any], inputs: list[torch.Tensor], numerics: str) -> Kernel:
    (kernel,) = (k for launch in plan_of(lambda: program(*inputs), numerics=numerics).launches for k in launch.kernels)
    return kernel


def chain(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return ((x * y + 1.5).exp() * y).to(torch.bfloat16).tanh()


def compared(x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    product = x * y
    return [product > 0.3, product.exp()]


def n_rounded(kernel: Kernel) -> int:
    return render(kernel).text.partition("def " + render(kernel).name)[2].count("to_bf16(")


def test_only_the_result_of_a_chain_is_rounded() -> None:
    strict, fast = (only(chain, BF16, grade) for grade in ("strict", "fast"))
    assert len(strict.steps) == len(fast.steps) >= 5
    assert n_rounded(strict) >= 5 and n_rounded(fast) == 1
    assert text_key(strict) != text_key(fast)


def test_a_comparison_has_both_of_its_sides_rounded() -> None:
    # The product, the number that it is compared with, and the result of exp.
    assert n_rounded(only(compared, BF16, "fast")) == 3


def test_a_sum_of_a_chain_is_of_unrounded_numbers() -> None:
    def program(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x.view(256, 256) * y.view(256, 256)).sum(1)

    strict, fast = (only(program, BF16, grade) for grade in ("strict", "fast"))
    assert strict.reduced and n_rounded(strict) == 2 and n_rounded(fast) == 1
    assert text_key(strict) != text_key(fast)


def test_a_kernel_in_float32_and_those_of_other_grades_are_as_they_were() -> None:
    assert only(lambda x, y: (x * y).exp(), FP32, "fast").rounds
    assert only(chain, BF16, "bitwise").rounds and only(chain, BF16, "strict").rounds
    assert not only(chain, FP32, "fast").rounds, "it has a cast to 16 bits in its middle"


def test_an_op_whose_rule_is_near_eagers_is_fused_in_fast_alone() -> None:
    def program() -> torch.Tensor:
        return torch.hypot(FP32[0] * 2, FP32[1]) + 1

    strict, fast = (plan_of(program, numerics=grade) for grade in ("strict", "fast"))
    assert any("hypot" in reason and "every bit" in reason for reason in reasons(strict))
    assert not reasons(fast) and fast.n_launches == 1 < strict.n_launches


def test_the_context_may_be_faster_than_the_knob_but_not_than_bitwise() -> None:
    options = kitsune.engine_options.EngineOptions(numerics="fast")
    for knob, grade in (("strict", "fast"), ("fast", "fast"), ("bitwise", "bitwise")):
        with kitsune.config.patch(numerics=knob):
            assert options.grade == grade


@pytest.mark.parametrize("arch", [80, 90])
def test_it_compiles_without_a_device(arch: int, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    text = compiled_kernel(Compiler(tmp_path), render(only(chain, BF16, "fast")), arch).asm["ptx"]
    strict = compiled_kernel(Compiler(tmp_path), render(only(chain, BF16, "strict")), arch).asm["ptx"]
    assert 0 < text.count("cvt.rn.bf16") < strict.count("cvt.rn.bf16") / 3


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu_a_chain_is_nearer_to_float64_than_eagers(dtype: torch.dtype) -> None:
    x, y = (torch.randn(N, generator=torch.Generator().manual_seed(k)).to("cuda", dtype) for k in (0, 1))

    def program(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        z = x
        for _ in range(8):
            z = z * 0.9 + y * 0.3
        return z

    exact, eager = program(x.double(), y.double()), program(x, y)
    for _ in range(2):
        with kitsune.accelerate(warmup=0, device="cuda", numerics="fast"):
            got = program(x, y)
    assert kitsune.counters()["fused"] and not kitsune.explain().mended
    off, eagers = ((t.double() - exact).abs().mean() for t in (got * 1, eager))
    # Of seventeen roundings one is left.
    assert off < 0.5 * eagers
