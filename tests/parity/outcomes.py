"""What a call of a sample leaves behind, in eager and under Kitsune, and in what two such outcomes differ."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests import _compare, _opinfo

# Results that hold whatever was in memory before: compared in everything but their values.
UNINITIALISED: dict[str, str] = {
    "empty": "allocates without writing",
    "empty_like": "allocates without writing",
    "empty_permuted": "allocates without writing",
    "empty_strided": "allocates without writing",
    "new_empty": "allocates without writing",
    "new_empty_strided": "allocates without writing",
}

# Entries that differ from themselves in eager, by what was in memory before: compared to within a few roundings.
UNREPEATABLE: dict[str, str] = {
    "linalg.lstsq": "LAPACK's gelsy reads pivots that torch does not set: 5 results in 300 calls in eager",
    "linalg.lstsq.grad_oriented": "as linalg.lstsq",
}


@dataclass(frozen=True)
class Outcome:
    """What one run leaves behind: outputs, gradients, the inputs as they are afterwards, and the state of the generator."""

    outputs: list[Any]
    grads: list[Any]
    inputs: list[torch.Tensor]
    aliases: list[int]
    generator: bytes
    error: str = ""


def run(sample: Any, context: AbstractContextManager[Any], backward: bool = True) -> Outcome:
    """Call a sample of its own memory, and have its gradients."""
    inputs = sample.tensors()
    _opinfo.reseed()
    outputs: Any = ()
    grads: list[Any] = []
    error = ""
    try:
        with context:
            outputs = sample.call()
            if backward:
                grads = _gradients(tree_leaves(sample.loss_of(outputs)), inputs)
    except Exception as caught:  # the same exception is the same behaviour
        # An error that depends on values may come after the call has returned, when what it left has no values.
        outputs, grads, error = (), [], f"{type(caught).__name__}: {caught}"
    leaves = tree_leaves(outputs)
    tensors = [t for t in (*inputs, *leaves, *grads) if isinstance(t, torch.Tensor)]
    return Outcome(leaves, grads, inputs, _compare.alias_sets(tensors), torch.get_rng_state().numpy().tobytes(), error)


def _gradients(outputs: list[Any], inputs: list[torch.Tensor]) -> list[Any]:
    heads = [t for t in outputs if isinstance(t, torch.Tensor) and t.requires_grad]
    heads = [t if t.layout is torch.strided else t.to_dense() for t in heads]
    leaves = [t for t in inputs if t.requires_grad and t.is_leaf]
    if not heads or not leaves:
        return []
    # Made by the eager run, outside of any context, and remembered for the others.
    torch.autograd.backward(heads, [_random(t.shape, t.dtype, t.device) for t in heads])
    return [t.grad for t in leaves]


@lru_cache(maxsize=256)
def _random(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(_opinfo.SEED)
    return torch.randn(shape, generator=generator, dtype=dtype).to(device)


def _value_comparison(name: str, field: str) -> _compare.Comparison | None:
    if field == "outputs" and name in UNINITIALISED:
        return None
    return _compare.rounding_difference if name in UNREPEATABLE else _compare.value_difference


class AnyMode(TorchDispatchMode):
    """Calls what it is given, and no more: what differs from eager under it, torch does otherwise under any mode."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def is_as_under_any_mode(sample: Any, got: Outcome) -> bool:
    """Is what differs from eager, in each bit, what torch makes of a fresh sample under a mode that does nothing?"""
    return not any(differences(sample.name, run(sample, AnyMode()), got))


def differences(name: str, expected: Outcome, got: Outcome) -> Iterator[str]:
    if expected.error != got.error:
        yield f"raised {got.error!r} instead of {expected.error!r}"
    for field in ("outputs", "grads", "inputs"):
        here, there = getattr(got, field), getattr(expected, field)
        if len(here) != len(there):
            yield f"{len(here)} {field} instead of {len(there)}"
        compare = _value_comparison(name, field)
        for i, (a, b) in enumerate(zip(there, here, strict=False)):
            # A backward that was followed leaves a node that says so, and no graph of named ones.
            skip = ("history",) if isinstance(b, torch.Tensor) and _compare.history(b) == "GoneBackward" else ()
            if difference := _compare.difference(a, b, values=compare, skip=skip):
                yield f"{field}[{i}]: {difference}"
    if got.aliases != expected.aliases:
        yield f"alias sets of inputs, outputs and gradients: {got.aliases} instead of {expected.aliases}"
    if got.generator != expected.generator:
        yield "the generator's state"
