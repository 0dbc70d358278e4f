"""Every entry of torch's operator database: forward and backward as in eager, bit for bit, recorded and recognised."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from functools import lru_cache

import pytest
import torch

import kitsune
from tests import _opinfo
from tests.parity.expected import PASSES_THROUGH, PASSES_THROUGH_ON_CPU, PASSES_THROUGH_ON_CUDA
from tests.parity.outcomes import Outcome, differences, is_as_under_any_mode, run

pytest.importorskip("expecttest", reason="torch's operator database needs expecttest")

NAMES = _opinfo.names()
ROUNDS = 3

# Entries that read a value on the host in some releases of torch only.
MAY_PASS_THROUGH: dict[str, str] = {
    "nanquantile": "torch 2.11 checks the range of q on the host",
    "quantile": "torch 2.11 checks the range of q on the host",
}

# Backward kernels that add in the order in which threads arrive, on CUDA: two eager runs may agree and a third differ.
UNORDERED_ON_CUDA = {
    "grid_sampler_2d",
    "grid_sampler_3d",
    "nn.functional.adaptive_avg_pool2d",
    "nn.functional.adaptive_avg_pool3d",
    "nn.functional.grid_sample",
}


@lru_cache(maxsize=2)
def eager(name: str, device: str, dtype: torch.dtype | None = None) -> tuple[Outcome, list[str]]:
    """The outcome in eager, and in what a second eager run differs from it."""
    first, second = (run(sample(name, device, dtype), nullcontext()) for _ in range(2))
    return first, list(differences(name, first, second))


def sample(name: str, device: str, dtype: torch.dtype | None = None) -> _opinfo.Sample:
    """The entry's representative sample, over its own memory."""
    found = _opinfo.sample(name, device, dtype)
    if found is None:
        pytest.skip(f"{name} does not support {dtype or 'any dtype'} on {device}")
    return found.fresh()


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    kitsune.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def lazily(name: str, device: str, warmup: int) -> tuple[Outcome, str]:
    """One run under Kitsune; the second part says in which way the run was not lazy, if it was not."""
    before = kitsune.counters()
    got = run(sample(name, device), kitsune.accelerate(warmup=warmup, device=device))
    after = kitsune.counters()  # before anything is compared: reads count as well
    if after["passed_through"] != before["passed_through"]:
        return got, f"passed through: {after['passed_through']}"
    for count in ("recorded", "recognised"):
        if after[count] <= before[count]:
            return got, f"nothing was {count}"
    flushed = sum(after["flushed"].values()) > sum(before["flushed"].values())
    return got, "" if flushed else "nothing was flushed"


def check(name: str, device: str, warmup: int) -> None:
    expected, unstable = eager(name, device)
    if unstable and device != "cpu":
        pytest.skip(f"two eager runs of {name} differ: {unstable[0]}")
    assert not unstable
    if expected.error:
        # Not on this device or in this version of torch: then it must fail in the same words.
        got, _ = lazily(name, device, warmup)
        assert got.error == expected.error
        return
    for turn in range(ROUNDS):
        got, why_not = lazily(name, device, warmup)
        told = list(differences(name, expected, got))
        assert not told or is_as_under_any_mode(sample(name, device), got), f"round {turn}: {told}"
    if name in PASSES_THROUGH | (PASSES_THROUGH_ON_CUDA if device == "cuda" else PASSES_THROUGH_ON_CPU):
        assert why_not, "is lazy by now: take it out of the table"
    elif name not in MAY_PASS_THROUGH:
        assert not why_not


@pytest.mark.parametrize("warmup", [0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_entry_is_as_in_eager(name: str, warmup: int) -> None:
    if name in PASSES_THROUGH_ON_CUDA:
        pytest.skip("compiles a CUDA kernel")
    check(name, "cpu", warmup)


@pytest.mark.gpu
@pytest.mark.parametrize("warmup", [0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_entry_is_as_in_eager_on_cuda(name: str, warmup: int, deterministic: None) -> None:
    if name in UNORDERED_ON_CUDA:
        pytest.skip("eager itself: two runs may differ")
    check(name, "cuda", warmup)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def test_few_entries_pass_through() -> None:
    assert len(PASSES_THROUGH | PASSES_THROUGH_ON_CPU | PASSES_THROUGH_ON_CUDA) <= len(NAMES) / 10
    assert all(PASSES_THROUGH.values())
