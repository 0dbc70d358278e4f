"""Torch's own modules, whose calls are known to compute from their attributes and their arguments alone; and what could have them
do something else.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as _of_all

from kitsune.lazy.replaced import is_torchs

# Torch's modules whose calls are taken, with the functions that they call. Their methods are looked at, too.
_CALLS: dict[type[nn.Module], str] = {
    nn.Linear: "linear",
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.BatchNorm1d: "batch_norm",
    nn.BatchNorm2d: "batch_norm",
    nn.LayerNorm: "layer_norm",
    nn.Embedding: "embedding",
    nn.Dropout: "dropout",
    nn.ReLU: "relu",
    nn.GELU: "gelu",
    nn.MaxPool2d: "max_pool2d",
    nn.AdaptiveAvgPool2d: "adaptive_avg_pool2d",
}
_METHODS = ("forward", "__getattr__", "_call_impl", "_conv_forward", "_check_input_dim")
BASE: Any = nn.Module.__call__
# By class, the methods and functions that its calls go through: (owner, name, what is there when nobody has put another there).
_Trusted = list[tuple[Any, str, Any]]


def _trusted(cls: type[nn.Module], function: str) -> _Trusted:
    found: _Trusted = [(cls, name, getattr(cls, name)) for name in _METHODS if hasattr(cls, name)]
    return [*found, (F, function, getattr(F, function)), (Tensor, "add_", Tensor.add_)]


TRUSTED = {cls: _trusted(cls, name) for cls, name in _CALLS.items() if all(is_torchs(it) for *_, it in _trusted(cls, name))}
KNOWN = frozenset(TRUSTED) if is_torchs(BASE) else frozenset()
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
GLOBAL_HOOKS = [getattr(_of_all, f"_global{name}") for name in HOOKS]
_tracing_state = torch._C._get_tracing_state  # type: ignore[attr-defined]


def may_learn(module: Any) -> bool:
    """Is it called as torch would by itself? What hooks do is no part of what it does."""
    if nn.Module.__call__ is not BASE or any(getattr(owner, name) is not it for owner, name, it in TRUSTED[type(module)]):
        return False
    return _tracing_state() is None and not any(GLOBAL_HOOKS) and not any(getattr(module, name) for name in HOOKS)
