"""Plain tensors that share a wrapper's count of writes, as in eager all that is on one memory does but what `.data` gives."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack, _pop_mode, _push_mode

from kitsune.ir import storage_of
from kitsune.lazy.tensor import LazyTensor, as_plain
from kitsune.lazy.used_again import keep

_detach = torch._C.TensorBase.detach
# Whatever handles an op in this thread now, autograd is to see that something is detached, and to ask Python for it.
_SEES = torch._C.DispatchKeySet(torch._C.DispatchKey.Python) | torch._C.DispatchKeySet(torch._C.DispatchKey.PythonTLSSnapshot)
for _name in ("ADInplaceOrView", "AutogradOther", "AutogradCPU", "AutogradCUDA"):
    _SEES = _SEES | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _name))


class Answer(TorchDispatchMode):
    """Gives torch a tensor as what it has asked for; torch then gives that the count of writes of what it was to detach."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # The default has each call imported into dynamo.
        return False

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__()
        self._tensor: torch.Tensor | None = tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensor, self._tensor = self._tensor, None
        # Once: after an interrupt it may be left where it is.
        return func(*args, **(kwargs or {})) if tensor is None else tensor


def alias_of(wrapper: LazyTensor) -> torch.Tensor:
    """The computed value as a plain leaf on the same memory, which shares the wrapper's count of writes from here on."""
    # Calls that are made again give their results other counts.
    wrapper._own_up()
    return with_count_of(wrapper, as_plain(wrapper, requires_grad=False))


def with_count_of(wrapper: LazyTensor, plain: torch.Tensor) -> torch.Tensor:
    """The plain tensor, which has no history and shares the wrapper's count of writes from here on."""
    # One that is used again has its count begin at zero.
    keep([wrapper])
    if wrapper.is_inference():
        # It has none.
        return plain if plain.is_inference() else for_inference(plain)
    if plain.is_inference():
        return plain
    include, exclude = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    answer = Answer(plain)
    with torch._C.DisableTorchFunction(), torch._C._ForceDispatchKeyGuard(include, exclude - _SEES):
        try:  # Within, since an interrupt may come between any two lines.
            _push_mode(answer)
            return _detach(wrapper)
        finally:
            if answer in _get_current_dispatch_mode_stack():
                _pop_mode()


def for_inference(tensor: torch.Tensor) -> torch.Tensor:
    """An inference tensor on the memory of one that is none."""
    storage = storage_of(tensor)
    with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch(), torch.inference_mode():
        made = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        made.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())
        torch._C._set_conj(made, tensor.is_conj())
        torch._C._set_neg(made, tensor.is_neg())
    return made
