"""One deterministic sample per entry of torch's operator database: the only place that imports it.

The database needs ``expecttest`` and ``numpy``. Importing it freezes the global ``torch.backends`` flags and wraps the
calls of scripted functions; both are undone here, so that a test in the same process sees torch as a user does.
"""

from __future__ import annotations

import contextlib
import functools
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

import numpy
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

SEED = 2731
MAX_SAMPLES = 1000  # how far into an entry's samples a representative one is looked for
MAX_CALLS = 8  # how many of them are called to see whether they do anything


@functools.cache
def _database() -> dict[str, Any]:
    frozen = torch.backends.flags_frozen()
    calls = torch._C.ScriptFunction.__call__, torch._C.ScriptMethod.__call__
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db
    if not frozen:
        torch.backends.__allow_nonbracketed_mutation_flag = True
    torch._C.ScriptFunction.__call__, torch._C.ScriptMethod.__call__ = calls
    return {f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name: op for op in op_db}


@dataclass(frozen=True)
class Sample:
    """A call of one entry: ``call(inputs)`` runs it; ``inputs`` is (input, args, kwargs)."""

    name: str
    dtype: torch.dtype
    inputs: tuple[Any, ...]
    op: Callable[..., Any]
    loss_of: Callable[[Any], Any]
    differentiable: bool

    def call(self, inputs: tuple[Any, ...]) -> Any:
        return self.op(inputs[0], *inputs[1], **inputs[2])

    def fresh(self) -> Sample:
        """The same sample over its own memory, geometry kept."""
        return replace(self, inputs=tree_map(_clone, self.inputs))


def names() -> list[str]:
    return sorted(_database())


def reseed(seed: int = SEED) -> None:
    torch.manual_seed(seed)
    numpy.random.seed(seed)
    random.seed(seed)


@functools.lru_cache(maxsize=4)
def sample(name: str, device: str, dtype: torch.dtype | None = None) -> Sample | None:
    """The entry's representative sample; None when it does not support the dtype, or any, on the device."""
    op = _database()[name]
    if dtype is None:
        dtype = _dtype(op, device)
    if dtype is None or not op.supports_dtype(dtype, device):
        return None
    grad = op.supports_autograd and op.supports_dtype(dtype, device) and dtype in op.supported_backward_dtypes(device)
    reseed()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = _representative(op, op.sample_inputs(torch.device(device), dtype, requires_grad=grad))
    inputs = (found.input, tuple(found.args), dict(found.kwargs))
    return Sample(name, dtype, inputs, op, found.output_process_fn_grad, grad)


def _dtype(op: Any, device: str) -> torch.dtype | None:
    """float32 where the entry has it, else its first supported dtype by name."""
    supported = op.supported_dtypes(device)
    return torch.float32 if torch.float32 in supported else min(supported, key=str, default=None)


def _representative(op: Any, samples: Iterator[Any]) -> Any:
    """The first sample that does something to a first tensor neither empty nor 0-dim, else the first of all."""
    looked_at = islice(samples, MAX_SAMPLES)
    first = next(looked_at)
    candidates = islice((s for s in chain([first], looked_at) if _has_elements(s)), MAX_CALLS)
    return next((s for s in candidates if _calls_aten(op, s)), first)


def _has_elements(found: Any) -> bool:
    tensors = [t for t in tree_leaves((found.input, found.args, found.kwargs)) if isinstance(t, torch.Tensor)]
    return bool(tensors) and tensors[0].dim() > 0 and tensors[0].numel() > 0


class _Counter(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def _calls_aten(op: Any, found: Any) -> bool:
    """Does the call reach an operator, or (a dropout out of training) hand back what it was given?"""
    inputs = tree_map(_clone, (found.input, tuple(found.args), dict(found.kwargs)))
    with _Counter() as counter, contextlib.suppress(Exception):
        op(inputs[0], *inputs[1], **inputs[2])
    return counter.calls > 0


def _clone(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    plain = leaf.detach()
    if plain.layout is torch.strided:
        storage = plain.untyped_storage().clone()
        plain = torch.empty(0, dtype=plain.dtype, device=plain.device).set_(
            storage, leaf.storage_offset(), leaf.size(), leaf.stride()
        )
    else:
        plain = plain.clone()
    return plain.requires_grad_(leaf.requires_grad)
