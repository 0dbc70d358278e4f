"""Every op that is lowered, as a kernel of its own: the numbers that eager's CUDA kernel gives, bit for bit but for a few."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kitsune.codegen import Compiler, exactness, render, toolkit_libdevice, why_not_lowered
from kitsune.ir.plan import Launch
from kitsune.runtime.kernel_launch import PreparedLaunch
from tests.codegen.build import Built, build
from tests.codegen.samples import SAMPLES, Sample, draw

pytestmark = pytest.mark.gpu

N = 1 << 17
CASES = [(i, dtype) for i, sample in enumerate(SAMPLES) for dtype in sample.dtypes]
INTEGERS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Compiler:
    return Compiler(tmp_path_factory.mktemp("kernels"))


def inputs_of(sample: Sample, dtype: torch.dtype) -> Iterator[list[torch.Tensor]]:
    """Ordinary numbers of either parity of length, then any bits at all."""
    yield draw(sample, dtype, (N,), "cuda")
    yield draw(sample, dtype, (333, 7), "cuda", seed=1)
    if dtype.is_floating_point and sample.like != "adam":
        yield _any_bits(draw(sample, dtype, (N,), "cuda", seed=2))


def _any_bits(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """All 65,536 values of a half type in the first tensor; random bits elsewhere."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for number, t in enumerate(tensors):
        if not t.dtype.is_floating_point:
            found.append(t)
            continue
        integers = INTEGERS[t.dtype]
        bits = torch.randint(-(2**31), 2**31, (t.numel(),), generator=generator)
        if integers is torch.int64:
            bits = bits << 32 | torch.randint(0, 2**31, (t.numel(),), generator=generator)
        if number == 0 and integers is torch.int16:
            bits = torch.arange(t.numel())
        found.append(bits.to(integers).view(t.dtype).cuda())
    return found


def run(built: Built, compiler: Compiler, fresh: list[torch.Tensor], originals: list[torch.Tensor]) -> list[torch.Tensor]:
    """The kernel's results, from the inputs as they were before."""
    kernel = built.kernel
    outputs = [torch.full_like(t, 1) for t in built.written]
    before = {id(t): f for t, f in zip(originals, fresh, strict=True)}
    tensors = [*(before.get(id(t), t) for t in built.read), *outputs]
    where = {
        id(access): tensor.data_ptr()
        for access, tensor in zip((*kernel.loads, *(s.access for s in kernel.stores)), tensors, strict=True)
    }
    launch = PreparedLaunch(Launch((kernel,)), render(kernel), compiler)
    launch.start(lambda access: where[id(access)], built.slots, torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()
    return outputs


def distance(got: torch.Tensor, expected: torch.Tensor) -> int:
    """Units in the last place between the two, at most; any NaN is like any other."""
    assert got.dtype == expected.dtype and got.shape == expected.shape
    if not got.dtype.is_floating_point:
        return int((got != expected).any()) * 2**31
    if not torch.equal(got.isnan(), expected.isnan()):
        return 2**31
    a, b = (_ordered(t.nan_to_num(0.0, float("inf"), float("-inf"))) for t in (got, expected))
    plain = int((a - b).abs().max()) if got.numel() else 0
    return plain or int((got.signbit() != expected.signbit())[~got.isnan()].any())


def _ordered(t: torch.Tensor) -> torch.Tensor:
    """The bits as integers in the order of the numbers."""
    bits = t.contiguous().view(INTEGERS[t.dtype]).long()
    lowest = torch.iinfo(INTEGERS[t.dtype]).min
    return torch.where(bits < 0, lowest - bits, bits)


def name_of(case: tuple[int, torch.dtype]) -> str:
    return f"{case[0]}-{SAMPLES[case[0]].rule}-{str(case[1]).removeprefix('torch.')}"


def measure(sample: Sample, dtype: torch.dtype, compiler: Compiler) -> tuple[int, int]:
    """The largest distance seen, and the largest that the tables of `kitsune.codegen.exactness` allow."""
    worst = allowed = 0
    for inputs in inputs_of(sample, dtype):
        fresh = [t.clone() for t in inputs]
        eager = sample.call(*(t.clone() for t in inputs))
        built = build(sample.call, inputs, sample.rule, sample.moving)
        reasons = [reason for op in built.ops if (reason := why_not_lowered(op))]
        assert not reasons
        allowed = max(exactness.distance(op, toolkit_libdevice() is not None)[0] for op in built.ops)
        got = run(built, compiler, fresh, inputs)
        for a, b in zip(got, [eager] if isinstance(eager, torch.Tensor) else eager, strict=True):
            worst = max(worst, distance(a, b))
    return worst, allowed


@pytest.mark.parametrize("case", CASES, ids=map(name_of, CASES))
def test_kernel_is_as_eager(case: tuple[int, torch.dtype], compiler: Compiler) -> None:
    sample, dtype = SAMPLES[case[0]], case[1]
    try:
        sample.call(*draw(sample, dtype, (4,), "cuda"))
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"eager has no kernel: {error}"[:200])
    worst, allowed = measure(sample, dtype, compiler)
    note(name_of(case), worst)
    assert worst <= allowed


def note(case: str, worst: Any) -> None:
    """A line of the file that KEEP_DISTANCES names; several processes may write to it."""
    if path := os.environ.get("KEEP_DISTANCES"):
        with Path(path).open("a") as file:
            file.write(json.dumps({"case": case, "ulp": worst}) + "\n")
