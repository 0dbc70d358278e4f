"""Deterministic samples of the entries of torch's databases of operators: the only place that imports them.

The databases need ``expecttest`` and ``numpy``. Importing them freezes the global ``torch.backends`` flags and wraps the
calls of scripted functions; both are undone here, so that a test in the same process sees torch as a user does.
"""

from __future__ import annotations

import contextlib
import functools
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

import numpy
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

SEED = 2731
MAX_SAMPLES = 1000  # how far into an entry's samples a representative one is looked for
MAX_CALLS = 8  # how many of them are called to see whether they do anything


@functools.cache
def _database() -> dict[str, Any]:
    frozen = torch.backends.flags_frozen()
    calls = torch._C.ScriptFunction.__call__, torch._C.ScriptMethod.__call__
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.autograd_function_db import autograd_function_db
        from torch.testing._internal.common_methods_invocations import op_db
        from torch.testing._internal.custom_op_db import custom_op_db
    if not frozen:
        torch.backends.__allow_nonbracketed_mutation_flag = True
    torch._C.ScriptFunction.__call__, torch._C.ScriptMethod.__call__ = calls
    found = {f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name: op for op in op_db}
    return found | {
        f"{kind}/{op.name}": op for kind, db in (("function", autograd_function_db), ("custom", custom_op_db)) for op in db
    }


class Unmade(Exception):
    """An entry of the database raises where it is to make a sample: there is nothing yet that eager, or Kitsune, could run."""


@dataclass(frozen=True)
class Sample:
    """A call of one entry; ``inputs`` is (input, args, kwargs)."""

    name: str
    dtype: torch.dtype
    inputs: tuple[Any, ...]
    op: Callable[..., Any]
    loss_of: Callable[[Any], Any]
    differentiable: bool

    def call(self) -> Any:
        return self.op(self.inputs[0], *self.inputs[1], **self.inputs[2])

    def tensors(self) -> list[torch.Tensor]:
        return [t for t in tree_leaves(self.inputs) if isinstance(t, torch.Tensor)]

    def fresh(self, moved: bool = False) -> Sample:
        return replace(self, inputs=copies(self.inputs, moved))


def copies(tree: Any, moved: bool = False) -> Any:
    """Each tensor over its own memory, geometry kept; ``moved`` has the elements of floating ones in other places."""
    return tree_map(_moved if moved else _clone, tree)


def names(databases: Sequence[str] = ("",)) -> list[str]:
    """The entries of ``op_db``, or of others: "function" is ``autograd_function_db``, "custom" is ``custom_op_db``."""
    return sorted(name for name in _database() if name.rpartition("/")[0] in databases)


def reseed(seed: int = SEED) -> None:
    # Without a GPU, torch.manual_seed keeps the stack of each call for the GPU that may come: a third of a sweep's time.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _sample(name, dtype, _differentiable(op, dtype, device), _representative(op, _inputs(op, device, dtype)))


def samples(name: str, device: str, dtype: torch.dtype) -> Iterator[Sample]:
    """Every sample of an entry; none where it does not support the dtype."""
    op = _database()[name]
    if op.supports_dtype(dtype, device):
        grad = _differentiable(op, dtype, device)
        yield from (_sample(name, dtype, grad, found) for found in _inputs(op, device, dtype))


def pending_samples(name: str, device: str, in_place: bool = False) -> Iterator[Sample]:
    """The samples of an entry's first dtype, or of its in-place variant: the call copies its operands, which are pending then."""
    op = _database()[name]
    dtype, made = _dtype(op, device), op.inplace_variant if in_place else op
    if dtype is None or made is None:
        return

    def of_copies(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, (args, kwargs))
        return made(*args, **kwargs)

    yield from (replace(found, op=of_copies) for found in samples(name, device, dtype))


def mapped_samples(name: str, device: str) -> Iterator[Sample]:
    """The samples of an entry's first dtype, called by ``vmap`` for two operands in the place of the first."""
    op = _database()[name]
    dtype = _dtype(op, device)

    def of_two(first: Any, *args: Any, **kwargs: Any) -> Any:
        two = torch.stack([first, first * 1])
        return torch.func.vmap(lambda one: op(one, *args, **kwargs), randomness="different")(two)

    for found in samples(name, device, dtype) if dtype is not None else ():
        if isinstance(found.inputs[0], torch.Tensor):
            yield replace(found, op=of_two)


def ungraded_samples(name: str, device: str) -> Iterator[Sample]:
    """The samples of an entry's first dtype of whose operands no gradient is wanted after all."""
    dtype = _dtype(_database()[name], device)
    for found in samples(name, device, dtype) if dtype is not None else ():
        if any(t.requires_grad for t in found.tensors()):
            yield replace(found, inputs=tree_map(_detached, found.inputs))


def error_samples(name: str, device: str) -> Iterator[Sample]:
    """The calls of an entry that are to raise."""
    op = _database()[name]
    reseed()
    # By name: some of them look at the beginning of it.
    for found in op.error_inputs(device) if raises(name) else ():
        yield _sample(name, torch.float32, False, found.sample_input)


def raises(name: str) -> bool:
    """Has the entry calls that are to raise?"""
    return _database()[name].error_inputs_func is not None


def supports_second_gradients(name: str) -> bool:
    return bool(_database()[name].supports_gradgrad)


def checked_function(sample: Sample) -> tuple[Callable[..., Any], list[torch.Tensor], float]:
    """What ``gradcheck`` takes: a function of the tensors that want a gradient, those, and how far two runs may be apart."""
    op = _database()[sample.name]
    leaves, spec = tree_flatten(sample.inputs)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]

    def function(*tensors: torch.Tensor) -> Any:
        given = dict(zip(places, tensors, strict=True))
        first, args, kwargs = tree_unflatten([given.get(i, leaf) for i, leaf in enumerate(leaves)], spec)
        return sample.loss_of(op.gradcheck_wrapper(op.op, first, *args, **kwargs))

    return function, [leaves[i] for i in places], op.gradcheck_nondet_tol


def _inputs(op: Any, device: str, dtype: torch.dtype) -> Iterator[Any]:
    reseed()
    grad = _differentiable(op, dtype, device)
    try:
        yield from op.sample_inputs(torch.device(device), dtype, requires_grad=grad)
    except Exception as error:
        raise Unmade(f"the database cannot make a sample: {type(error).__name__}: {error}") from error


def _sample(name: str, dtype: torch.dtype, grad: bool, found: Any) -> Sample:
    inputs = (found.input, tuple(found.args), dict(found.kwargs))
    return Sample(name, dtype, inputs, _database()[name], found.output_process_fn_grad, grad)


def _differentiable(op: Any, dtype: torch.dtype, device: str) -> bool:
    return bool(op.supports_autograd and dtype in op.supported_backward_dtypes(device))


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


def _detached(leaf: Any) -> Any:
    return _clone(leaf).requires_grad_(False) if isinstance(leaf, torch.Tensor) else leaf


def _moved(leaf: Any) -> Any:
    copy = _clone(leaf)
    floating = isinstance(copy, torch.Tensor) and (copy.is_floating_point() or copy.is_complex())
    if floating and copy.layout is torch.strided:
        everything = torch.empty(0, dtype=copy.dtype, device=copy.device).set_(copy.untyped_storage())
        everything.copy_(everything.roll(1))
    return copy


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
