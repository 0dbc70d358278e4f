"""What torch and this thread are set to: what a call depends on besides its arguments and what it finds by itself."""

from typing import Any

import torch
from torch._C._dynamo.guards import GlobalStateGuard
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from kitsune.config import config
from kitsune.contexts import free_to_skip
from kitsune.pipeline import profiled
from kitsune.runtime import library_switches
from kitsune.static.surroundings import foreign_hooks, has_global_hooks


class Unknowable(Exception):
    """Says in a sentence why a call cannot be told from others."""


def modes(device: torch.device) -> tuple[Any, ...]:
    """What torch's results, dtypes and graphs depend on besides tensors."""
    kind = device.type
    places = None
    if torch._C._len_torch_function_stack():
        stack = _get_current_function_mode_stack()
        if any(type(mode) is not DeviceContext for mode in stack):
            raise Unknowable("a function mode of another library is open")
        places = tuple(str(mode.device) for mode in stack)
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled(kind),
        # What `torch.autocast` inside of the function takes where it is told none.
        torch.get_autocast_dtype(kind),
        torch.is_autocast_cache_enabled(),
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


class Moment:
    """How all of that is set now, for a kind of device, and the libraries' switches with it.

    A call in C++ looks at most of it (0.2 us), where one for each takes 0.1 us while they are all that is run, and three times
    that in a step, which leaves none of them in a cache.
    """

    def __init__(self, kind: str) -> None:
        # Grad mode, autocast, default dtype, deterministic algorithms, reduced precision in matrix products.
        self._same = GlobalStateGuard().check
        self._kind, self._others = kind, _others(kind)

    def is_now(self) -> bool:
        """Is nothing set differently?"""
        return self._same() and _others(self._kind) == self._others

    @property
    def is_plain(self) -> bool:
        """Is nothing on of which a count alone would not tell one from another, or that looks at what is run?"""
        return not any(self._others[:7])


def _others(kind: str) -> tuple[Any, ...]:
    return (
        _n_function_modes(),
        _n_dispatch_modes(),
        _in_inference_mode(),
        _transform(),
        _tracing(),
        has_global_hooks(),
        profiled(),
        # Those so far are looked at by `is_plain`.
        _task(),
        _is_anomaly_on(),
        _autocast_dtype(kind),
        free_to_skip(),
        config.n_changes,
        _device() if kind == "cuda" else None,
        library_switches(),
    )


_n_function_modes, _n_dispatch_modes = torch._C._len_torch_function_stack, torch._C._len_torch_dispatch_stack
_in_inference_mode, _transform = torch.is_inference_mode_enabled, torch._C._functorch.peek_interpreter_stack
_tracing, _task, _is_anomaly_on = torch._C._get_tracing_state, torch._C._current_graph_task_id, torch.is_anomaly_enabled
_autocast_dtype = torch.get_autocast_dtype


def _device() -> int:
    return torch._C._cuda_getDevice()  # type: ignore[no-any-return, attr-defined]
