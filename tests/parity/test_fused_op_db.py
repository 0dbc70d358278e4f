"""Every entry of torch's operator database in three floating types, each pointwise op as a kernel: eager's bits on the GPU."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import kitsune
from kitsune.scheduler import Costs
from tests.parity.expected import PASSES_THROUGH, PASSES_THROUGH_ON_CUDA
from tests.parity.outcomes import differences, is_as_under_any_mode, run
from tests.parity.test_op_db import NAMES, UNORDERED_ON_CUDA, eager, sample

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Compiling takes longest, and these make no kernel or make it without the dispatcher.
ENTRIES = [name for name in NAMES if name not in PASSES_THROUGH and name not in PASSES_THROUGH_ON_CUDA]


@pytest.fixture(autouse=True)
def every_op_a_kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is left to the library because it would not pay."""
    monkeypatch.setattr(Costs, "alone", lambda self, kernel, has_out_form: True)
    kitsune.reset()
    torch.use_deterministic_algorithms(True, warn_only=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.use_deterministic_algorithms(False)
    kitsune.reset()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", ENTRIES)
def test_kernels_give_eagers_bits(name: str, dtype: torch.dtype) -> None:
    if name in UNORDERED_ON_CUDA:
        pytest.skip("eager itself: two runs may differ")
    expected, unstable = eager(name, "cuda", dtype)
    if unstable or expected.error:
        pytest.skip(f"eager itself: {(unstable or [expected.error])[0]}"[:200])
    for _ in range(2):
        got = run(sample(name, "cuda", dtype), kitsune.accelerate(warmup=1, device="cuda"))
        told = list(differences(name, expected, got))
        assert not told or is_as_under_any_mode(sample(name, "cuda", dtype), got), told
    report = kitsune.explain()
    assert not report.mended, "no kernel may fail to compile or start"
    if not report.counters["kernels"]:
        pytest.skip("no operator of it is put into a kernel")
    if path := os.environ.get("KEEP_KERNEL_COUNTS"):
        with Path(path).open("a") as file:
            file.write(json.dumps({"entry": name, "dtype": str(dtype), "kernels": report.counters["kernels"]}) + "\n")
