"""What torch and this thread are set to: what a call depends on besides its arguments and what it finds by itself."""

from typing import Any

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from kitsune.config import config
from kitsune.contexts import free_to_skip
from kitsune.pipeline import profiled
from kitsune.runtime import numeric_settings
from kitsune.static.surroundings import foreign_hooks, has_global_hooks


class Unknowable(Exception):
    """Says in a sentence why a call cannot be told from others."""


def modes(device: torch.device) -> tuple[Any, ...]:
    """What torch's results, dtypes and graphs depend on besides tensors."""
    kind = device.type
    autocast = (torch.get_autocast_dtype(kind), torch.is_autocast_cache_enabled()) if torch.is_autocast_enabled(kind) else None
    places = None
    if torch._C._len_torch_function_stack():
        stack = _get_current_function_mode_stack()
        if any(type(mode) is not DeviceContext for mode in stack):
            raise Unknowable("a function mode of another library is open")
        places = tuple(str(mode.device) for mode in stack)
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        autocast,
        places,
        torch.get_default_dtype(),
        torch.get_deterministic_debug_mode(),
        torch.is_anomaly_enabled(),
    )


def may_skip() -> bool:
    """Is this a place where nobody else sees the calls or ops of this thread?"""
    return (
        free_to_skip()
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._current_graph_task_id() == -1
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and not foreign_hooks()
    )


def where() -> tuple[Any, ...]:
    """What the pipeline of a context depends on."""
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    return device, config.device, config.warmup, config.max_pending_ops, config.max_pending_bytes


def moment(kind: str) -> tuple[Any, ...]:
    """All of that for a kind of device, and the libraries' settings: while it is the same, so are they."""
    return (
        # `is_plain` looks at these.
        torch._C._len_torch_function_stack(),
        torch.is_inference_mode_enabled(),
        has_global_hooks(),
        profiled(),
        torch._C._len_torch_dispatch_stack(),
        torch._C._functorch.peek_interpreter_stack(),
        torch._C._get_tracing_state(),
        # And these may be anything.
        torch._C._current_graph_task_id(),
        free_to_skip(),
        config.n_changes,
        _device() if kind == "cuda" else None,
        torch.is_grad_enabled(),
        torch.is_autocast_enabled(kind),
        torch.get_autocast_dtype(kind),
        torch.is_autocast_cache_enabled(),
        torch.get_default_dtype(),
        torch.get_deterministic_debug_mode(),
        torch.is_anomaly_enabled(),
        numeric_settings(),
    )


def is_plain(found: tuple[Any, ...]) -> bool:
    """Is nothing on that a count alone does not tell from another of its kind, or that looks at what is run?"""
    return not any(found[:7])


def _device() -> int:
    return torch._C._cuda_getDevice()  # type: ignore[no-any-return, attr-defined]
