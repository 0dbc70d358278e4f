"""What outlives a step becomes a plain tensor again: `.grad` fields and optimizer state."""

from collections.abc import Iterable
from typing import Any

import torch

from kitsune.ir import Barrier, LentMemory, lent_memory
from kitsune.lazy.tensor import LazyTensor, as_plain


def settle_grads(parameters: Iterable[torch.Tensor], at_exit: bool = True) -> None:
    """Replace each `.grad` that is a wrapper by a plain tensor on the same memory.

    While recording goes on, one in a captured graph's memory is left alone: most are dropped before the next replay.
    """
    for parameter in parameters:
        grad = parameter.grad
        # A gradient with a history of its own (create_graph) keeps it; one of another shape is left from before `.data = `.
        if type(grad) is LazyTensor and _can_settle(grad) and grad.shape == parameter.shape and (at_exit or _lent(grad) is None):
            parameter.grad = _settled(grad)


def settle_state(optimizer: torch.optim.Optimizer) -> None:
    """The same for the tensors that an optimizer keeps, and for its parameters' gradients."""
    for group in optimizer.param_groups:
        settle_grads(group["params"], at_exit=False)
    for state in optimizer.state.values():
        if isinstance(state, dict):
            for name, held in state.items():
                state[name] = _settled_tree(held)


def _settled_tree(held: Any) -> Any:
    if type(held) is LazyTensor and _can_settle(held):
        return _settled(held)
    if type(held) is list:  # LBFGS keeps lists of directions
        held[:] = [_settled_tree(x) for x in held]
    return held


def _can_settle(wrapper: LazyTensor) -> bool:
    return not wrapper.requires_grad and (wrapper.cell.real is not None or wrapper.cell.region.error is None)


def _lent(wrapper: LazyTensor) -> LentMemory | None:
    real = wrapper.cell.real
    return lent_memory(real) if real is not None else None


def _settled(wrapper: LazyTensor) -> torch.Tensor:
    memory = _lent(wrapper)
    plain = as_plain(wrapper, owned=memory is None, cause=Barrier.STEP)
    if memory is not None:
        # It moves when the graph is replayed while it is still there.
        memory.adopt(plain)
    torch._C._autograd._unsafe_set_version_counter((plain,), (wrapper._version,))  # type: ignore[attr-defined]
    return plain
