"""Every entry of torch's operator database: forward and backward as in eager, bit for bit, recorded and recognised."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

import kitsune
from tests import _compare, _opinfo

pytest.importorskip("expecttest", reason="torch's operator database needs expecttest")

NAMES = _opinfo.names()
ROUNDS = 3

# Entries that reach no lazy recording, or not only: each with what stands in the way.
PASSES_THROUGH: dict[str, str] = {
    name: reason
    for reason, names in {
        "calls no operator: its input is its result": "broadcast_shapes conj conj_physical contiguous "
        "nn.functional.feature_alpha_dropout.without_train positive real resolve_conj resolve_neg",
        "the shape of a result depends on values": "argwhere bincount combinations masked_select "
        "nonzero nonzero_static unique unique_consecutive",
        "an operator checks values on the host": "_segment_reduce.lengths _segment_reduce.offsets allclose histogramdd "
        "nn.functional.ctc_loss nn.functional.embedding_bag",
        "the error code of the solver is read": "linalg.cholesky linalg.eig linalg.eigvals linalg.inv "
        "linalg.ldl_factor linalg.lstsq linalg.lstsq.grad_oriented linalg.lu_factor linalg.solve linalg.tensorinv "
        "linalg.tensorsolve",
        "a value becomes a Python number": "corrcoef cov equal istft item nn.functional.gaussian_nll_loss nn.functional.one_hot",
        "an in-place operator changes a shape": "resize_ resize_as_ stft",
        "its backward makes a tensor of zeros without memory": "sgn",
        "works on sparse tensors": "sparse.mm.reduce sparse.sampled_addmm to_sparse",
        "an operator of another namespace": "nn.functional.linear_cross_entropy.chunked "
        "nn.functional.linear_cross_entropy.chunked_none",
    }.items()
    for name in names.split()
}

PASSES_THROUGH_ON_CPU: dict[str, str] = (
    {"quantile": "checks its probabilities", "nanquantile": "checks its probabilities"} if torch.__version__ < "2.12" else {}
)
PASSES_THROUGH_ON_CUDA: dict[str, str] = {
    "jiterator_2inputs_2outputs": "launches its kernel without the dispatcher",
    "jiterator_4inputs_with_extra_args": "launches its kernel without the dispatcher",
    "jiterator_binary": "launches its kernel without the dispatcher",
    "jiterator_binary_return_by_ref": "launches its kernel without the dispatcher",
    "jiterator_unary": "launches its kernel without the dispatcher",
}

# Entries that read a value on the host in some releases of torch only.
MAY_PASS_THROUGH: dict[str, str] = {
    "nanquantile": "torch 2.11 checks the range of q on the host",
    "quantile": "torch 2.11 checks the range of q on the host",
}

# Backward kernels that add in the order in which threads arrive, on CUDA: two eager runs may agree and a third differ.
UNORDERED_ON_CUDA = {"grid_sampler_2d", "grid_sampler_3d", "nn.functional.grid_sample", "nn.functional.adaptive_avg_pool3d"}

# Results that hold whatever was in memory before: compared in everything but their values.
UNINITIALISED: dict[str, str] = {
    "empty": "allocates without writing",
    "empty_like": "allocates without writing",
    "empty_permuted": "allocates without writing",
    "empty_strided": "allocates without writing",
    "new_empty": "allocates without writing",
    "new_empty_strided": "allocates without writing",
}

# Entries whose gradients torch computes by another formula while any dispatch mode is on: compared to within a few roundings.
OTHER_FORMULA: dict[str, str] = {
    "cumprod": "cumprod_backward divides by the input only for plain tensors",
    "masked.cumprod": "cumprod_backward divides by the input only for plain tensors",
    "prod": "prod_backward divides the result by the input only for plain tensors",
    "masked.prod": "prod_backward divides the result by the input only for plain tensors",
}

# Entries whose gradients torch computes in another layout for any wrapper subclass: compared in all but strides.
OTHER_STRIDES: dict[str, str] = {
    "ormqr": "the backward of householder_product works in place for plain tensors only",
}


@dataclass(frozen=True)
class Outcome:
    """What one run leaves behind: outputs, gradients, and the inputs as they are afterwards."""

    outputs: list[Any]
    grads: list[Any]
    inputs: list[torch.Tensor]
    error: str = ""

    @property
    def aliases(self) -> list[int]:
        return _compare.alias_sets([*self.inputs, *(t for t in self.outputs if isinstance(t, torch.Tensor))])


def run(
    name: str, device: str, context: AbstractContextManager[Any], backward: bool = True, dtype: torch.dtype | None = None
) -> Outcome:
    sample = _sample(name, device, dtype).fresh()
    inputs = _tensors(sample.inputs)
    _opinfo.reseed()
    outputs: Any = ()
    grads: list[Any] = []
    error = ""
    with context:
        try:
            outputs = sample.call(sample.inputs)
            if backward:
                grads = _gradients(tree_leaves(sample.loss_of(outputs)), inputs)
        except Exception as caught:  # the same exception is the same behaviour
            error = f"{type(caught).__name__}: {caught}"
    return Outcome(tree_leaves(outputs), grads, inputs, error)


def _gradients(outputs: list[Any], inputs: list[torch.Tensor]) -> list[Any]:
    heads = [t for t in outputs if isinstance(t, torch.Tensor) and t.requires_grad]
    heads = [t if t.layout is torch.strided else t.to_dense() for t in heads]
    leaves = [t for t in inputs if t.requires_grad]
    if not heads or not leaves:
        return []
    # Made by the eager run, outside of any context, and remembered for the others.
    cotangents = [_random(t.shape, t.dtype, t.device) for t in heads]
    return list(torch.autograd.grad(heads, leaves, cotangents, allow_unused=True))


@lru_cache(maxsize=256)
def _random(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(_opinfo.SEED)
    return torch.randn(shape, generator=generator, dtype=dtype).to(device)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


def _sample(name: str, device: str, dtype: torch.dtype | None = None) -> _opinfo.Sample:
    sample = _opinfo.sample(name, device, dtype)
    if sample is None:
        pytest.skip(f"{name} does not support {dtype or 'any dtype'} on {device}")
    return sample


@lru_cache(maxsize=2)
def eager(name: str, device: str, dtype: torch.dtype | None = None) -> tuple[Outcome, list[str]]:
    """The outcome in eager, and in what a second eager run differs from it."""
    first, second = (run(name, device, nullcontext(), dtype=dtype) for _ in range(2))
    return first, list(differences(name, first, second))


def _value_comparison(name: str, field: str) -> _compare.Comparison | None:
    if field == "outputs" and name in UNINITIALISED:
        return None
    return _compare.rounding_difference if field == "grads" and name in OTHER_FORMULA else _compare.value_difference


def differences(name: str, expected: Outcome, got: Outcome) -> Iterator[str]:
    if expected.error != got.error:
        yield f"raised {got.error!r} instead of {expected.error!r}"
    for field in ("outputs", "grads", "inputs"):
        here, there = getattr(got, field), getattr(expected, field)
        if len(here) != len(there):
            yield f"{len(here)} {field} instead of {len(there)}"
        skip = ("stride",) if field == "grads" and name in OTHER_STRIDES else ()
        compare = _value_comparison(name, field)
        for i, (a, b) in enumerate(zip(there, here, strict=False)):
            if difference := _compare.difference(a, b, values=compare, skip=skip):
                yield f"{field}[{i}]: {difference}"
    if got.aliases != expected.aliases:
        yield f"alias sets of inputs and outputs: {got.aliases} instead of {expected.aliases}"


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    kitsune.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def lazily(name: str, device: str, warmup: int) -> tuple[Outcome, str]:
    """One run under Kitsune; the second part says in which way the run was not lazy, if it was not."""
    before = kitsune.counters()
    got = run(name, device, kitsune.accelerate(warmup=warmup, device=device))
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
        assert not list(differences(name, expected, got)), f"round {turn}"
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
