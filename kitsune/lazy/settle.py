"""What outlives a step becomes a plain tensor again: `.grad` fields and optimizer state."""

import contextlib
from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch

from kitsune.ir import Barrier, lent_memory
from kitsune.lazy.aliases import with_count_of
from kitsune.lazy.cell import Cell
from kitsune.lazy.recorders import OPEN
from kitsune.lazy.tensor import LazyTensor
from kitsune.lazy.used_again import counts_of

_NOTHING: Any = contextlib.nullcontext()
# A tensor over the same memory, with a count of writes of its own.
_alias = torch._C.TensorBase.data.__get__  # type: ignore[attr-defined]


def settle_grads(parameters: Iterable[torch.Tensor]) -> None:
    """Replace each `.grad` that is a wrapper by a plain tensor on the same memory.

    While recording goes on they stay what they are: most are dropped before they are read.
    """
    wrappers, owners = [], []
    for parameter in parameters:
        grad = parameter.grad
        # A gradient with a history of its own (create_graph) keeps it; one of another kind is left from before `.data = `.
        if type(grad) is LazyTensor and _can_settle(grad) and (grad.shape, grad.dtype) == (parameter.shape, parameter.dtype):
            wrappers.append(grad)
            owners.append(parameter)
    grad = None
    held = _are_held(wrappers)
    for k, (parameter, plain) in enumerate(zip(owners, _settled(wrappers), strict=True)):
        # To share a count takes 25 us (CPU).
        parameter.grad = with_count_of(wrappers[k], plain) if held[k] else plain


def _are_held(gradients: list[LazyTensor]) -> list[bool]:
    """Does somebody besides this list and its parameter hold each: the program, or autograd, which compares counts of writes?"""
    in_python, in_c, _ = counts_of(gradients)
    return [(n, n_in_c) != _NOT_HELD for n, n_in_c in zip(in_python, in_c, strict=True)]


def _counts_of_a_gradient() -> tuple[int, int]:
    parameter = torch.zeros((), requires_grad=True)
    parameter.grad = torch.zeros(())
    in_python, in_c, _ = counts_of([parameter.grad])
    return in_python[0], in_c[0]


# Of one that only its parameter has. In which of the two a parameter counts depends on torch's version.
_NOT_HELD = _counts_of_a_gradient()


def settle_state(optimizer: torch.optim.Optimizer) -> None:
    """The same for the tensors that an optimizer keeps. Mostly there is nothing to do, which a look at their types tells."""
    states = [state for state in optimizer.state.values() if isinstance(state, dict)]
    if {LazyTensor, list}.isdisjoint(map(type, chain.from_iterable(map(dict.values, states)))):
        return
    for state in states:
        for name, held in state.items():
            state[name] = _settled_tree(held)


def _settled_tree(held: Any) -> Any:
    if type(held) is LazyTensor and _can_settle(held):
        return _settled([held])[0]
    if type(held) is list:  # LBFGS keeps lists of directions
        held[:] = [_settled_tree(x) for x in held]
    return held


def _can_settle(wrapper: LazyTensor) -> bool:
    # What an interrupted region has not computed stays as it is.
    cell = wrapper.cell
    return not wrapper.requires_grad and (cell.real is not None or cell.region is cell.region.recorder.region)


def _settled(wrappers: list[LazyTensor]) -> list[torch.Tensor]:
    """A plain tensor for each, with its count of writes. In 200 at once each costs 2 us, one after the other 12."""
    reals = _reals([wrapper.cell for wrapper in wrappers])
    outside = torch.inference_mode(False) if torch.is_inference_mode_enabled() else _NOTHING
    with outside, torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
        plain = [real if real.is_inference() else _alias(real) for real in reals]
    for real, tensor in zip(reals, plain, strict=True):
        memory = lent_memory(real)
        if memory is not None:
            # It moves when the graph is replayed while it is still there.
            memory.adopt(tensor)
    counted = [k for k, tensor in enumerate(plain) if not tensor.is_inference()]
    torch._C._autograd._unsafe_set_version_counter(  # type: ignore[attr-defined]
        tuple(plain[k] for k in counted), tuple(wrappers[k]._version for k in counted)
    )
    return plain


def _reals(cells: list[Cell]) -> list[torch.Tensor]:
    # With nothing pending anywhere there is nothing to wait for, which is what leaving a context comes to.
    pending = any(recording.region.node.depth for recording in {*OPEN, *(cell.region.recorder for cell in cells)})
    return [cell.region.recorder.materialize(cell, Barrier.STEP) if pending or cell.real is None else cell.real for cell in cells]
