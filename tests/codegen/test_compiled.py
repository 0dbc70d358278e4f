"""Machine code without a device: what the compiler made of a kernel is as fast and as exact as its text says."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kitsune.codegen import Compiler, render
from kitsune.ir.program import Program, Tile
from tests.codegen.build import Built, build, compiled_kernel
from tests.codegen.samples import SAMPLES, draw
from tests.codegen.test_tiles import launch_of

triton = pytest.importorskip("triton")

# A sample of the samples: every formula with its fma, division, root, library calls and integer forms.
CHOSEN = (
    "add div sqrt exp tanh pow gelu gelu_backward silu_backward tanh_backward sigmoid_backward maximum clamp lerp addcdiv where "
    "_to_copy remainder floor_divide mse_loss_backward native_dropout_backward _fused_adamw_ _fused_sgd_ signbit"
).split()


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Compiler:
    return Compiler(tmp_path_factory.mktemp("kernels"))


def chosen() -> list[tuple[int, torch.dtype]]:
    """The first sample of each chosen op, in float32 and in bfloat16."""
    found = []
    for name in CHOSEN:
        i = next(i for i, sample in enumerate(SAMPLES) if sample.rule == name)
        found += [(i, dtype) for dtype in SAMPLES[i].dtypes if dtype in (torch.float32, torch.bfloat16)]
    return found


def ptx_of(built: Built, compiler: Compiler, arch: int, divisibility: int = 16, batched: bool = False) -> str:
    ptx: str = compiled_kernel(compiler, render(built.kernel, batched), arch, divisibility).asm["ptx"]
    return ptx


@pytest.mark.parametrize(("i", "dtype"), chosen(), ids=lambda v: str(v).removeprefix("torch."))
def test_arithmetic_is_as_written(i: int, dtype: torch.dtype, compiler: Compiler) -> None:
    sample = SAMPLES[i]
    built = build(sample.call, draw(sample, dtype, (64,)), sample.rule, sample.moving)
    text = render(built.kernel).text
    ptx = ptx_of(built, compiler, 90 if dtype is torch.float32 else 80)
    assert "div.full" not in ptx
    calls = set(re.findall(r"libdevice\.(\w+)\(", text))
    if not calls - {"fma"}:
        # Library functions are written with approximations of their own.
        assert "div.approx" not in ptx and ".ftz" not in ptx
    if not calls:
        # A product alone may be an fma of 16 bits, which rounds it once as well.
        assert "fma.rn.f32" not in ptx and "fma.rn.f64" not in ptx
    assert vectorised(ptx) or "ld.global" not in ptx, "an aligned kernel loads 128 bits at a time"


def vectorised(ptx: str) -> bool:
    return bool(re.search(r"ld\.global(\.\w+)*\.v4\.b32", ptx))


def test_unaligned_code_loads_single_elements(compiler: Compiler) -> None:
    built = build(lambda x: x * 0.5, [torch.randn(64)], "half")
    assert ".v4" not in ptx_of(built, compiler, 90, divisibility=1)
    assert ".v4" in ptx_of(built, compiler, 90)


@pytest.mark.parametrize(("divisibility", "loads"), [(16, "v4.b32"), (8, "v4.b32"), (4, "v2.b32"), (2, "b32"), (1, "b16")])
@pytest.mark.parametrize("function", [lambda x: x.sum(1), lambda x: x.argmax(1)], ids=["held", "in a loop"])
def test_a_row_is_loaded_in_pieces_that_divide_its_length(
    function: Callable[..., Any], divisibility: int, loads: str, compiler: Compiler
) -> None:
    held = function(torch.zeros(1, 2)).is_floating_point()
    (kernel,) = launch_of(function, torch.zeros(300, 512 if held else 20000, dtype=torch.bfloat16)).kernels
    program = replace(render(kernel), tile=Tile(1, 512, 1) if held else Tile(1, 1024, 4))
    found = re.findall(r"ld\.global\.(?:\w+::\w+\.)*((?:v\d\.)?b\d+)", ptx_of_program(program, compiler, divisibility))
    assert set(found) == {loads}


def ptx_of_program(program: Program, compiler: Compiler, divisibility: int) -> str:
    ptx: str = compiled_kernel(compiler, program, 90, divisibility).asm["ptx"]
    return ptx


def test_a_batch_loads_128_bits_as_well(compiler: Compiler) -> None:
    built = build(lambda x: x * 0.5, [torch.randn(64)], "half")
    assert ".v4" in ptx_of(built, compiler, 90, batched=True)


def test_a_broadcast_row_is_loaded_in_vectors(compiler: Compiler) -> None:
    built = build(torch.add, [torch.randn(64, 32), torch.randn(32)], "bias")
    assert len(re.findall(r"ld\.global\S*\.v4", ptx_of(built, compiler, 90))) == 4


def test_no_register_is_spilled(compiler: Compiler, tmp_path: Path) -> None:
    sample = next(s for s in SAMPLES if s.rule == "_fused_adamw_")
    program = render(build(sample.call, draw(sample, torch.bfloat16, (64,)), "adam", sample.moving).kernel)
    registers, stack = resources(compiled_kernel(compiler, program, 90), tmp_path)
    assert stack == 0 and registers <= 128


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_rows_that_much_is_made_of_are_not_spilled(dtype: torch.dtype, compiler: Compiler, tmp_path: Path) -> None:
    """Of so many rows that few warps share one."""
    x, w = torch.zeros(2304, 4096, dtype=dtype), torch.zeros(4096, dtype=dtype)
    (kernel,) = launch_of(lambda x, w: (F.gelu(x * w + w) * x.tanh()).sum(1), x, w).kernels
    assert len(kernel.steps) == 6
    _, stack = resources(compiled_kernel(compiler, render(kernel), 90), tmp_path)
    assert stack == 0


def resources(kernel: Any, folder: Path) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack, which are spilled registers."""
    (folder / "k.cubin").write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip("this Triton brings no cuobjdump")
    said = subprocess.run([tool, "-res-usage", folder / "k.cubin"], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(pattern, said)[1]) for pattern in (r"REG:(\d+)", r"STACK:(\d+)"))  # type: ignore[index]
    return registers, stack


def test_another_batch_size_is_not_compiled_again(compiler: Compiler) -> None:
    first, second = (build(torch.add, [torch.randn(n, 8), torch.randn(8)], "bias") for n in (4, 32))
    assert compiler.compile(render(first.kernel), 90, 16, False) is compiler.compile(render(second.kernel), 90, 16, False)


def test_wide_indices_have_64_bits(compiler: Compiler) -> None:
    program = render(build(lambda x: x * 0.5, [torch.randn(64)], "half").kernel)
    wide = compiled_kernel(compiler, program, 90, wide=True)
    assert "mul.wide" in wide.asm["ptx"] or "i64" in wide.asm["ttir"]


LOOPED: list[Callable[..., Any]] = [
    lambda x: x.sum(1),
    lambda x: [(x * 2).amax(1), x.argmax(1)],
    lambda x: x.argmin(0),
    lambda x: x.softmax(1),
    lambda x: x.var(1),
]


@pytest.mark.parametrize("function", LOOPED, ids=["sum", "argmax", "argmin of columns", "softmax", "var"])
def test_wide_loops_are_compiled(function: Callable[..., Any], compiler: Compiler) -> None:
    """What a loop carries keeps its type, where columns are counted in 64 bits, too."""
    for kernel in launch_of(function, torch.zeros(300, 20000)).kernels:
        assert compiled_kernel(compiler, render(kernel), 90, wide=True).asm["ptx"]
