"""Forwards of a model under autocast, in a loop that does not ask for it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.hooks import RemovableHandle

from kitsune.amp.config import AMPConfig
from kitsune.amp.scale import LossScale

# bf16 has the range of float32, so that nothing needs to be scaled.
SCALED = torch.float16


class _Here(threading.local):
    """Of one thread: how many of our regions are open, and the scales of forwards that no step has ended yet."""

    def __init__(self) -> None:
        self.depth = 0
        self.scales: list[LossScale] = []


_here = _Here()


class HalfForward:
    """Runs outermost forwards of one optimizer's model under autocast.

    With no config it is bf16 where the device has it and float16 elsewhere. A forward that the program itself runs under
    autocast is left to the program, with its backward.
    """

    def __init__(self, config: AMPConfig | None) -> None:
        self.given = config
        self.scale = LossScale(config or AMPConfig())
        self._local = threading.local()
        # Hooks of forwards that failed: torch is going through its list of hooks when it tells of that.
        self._left: list[RemovableHandle] = []

    @property
    def inside(self) -> bool:
        """Is this thread in a forward that was begun here?"""
        return getattr(self._local, "region", None) is not None

    def dtype(self, device: torch.device) -> torch.dtype:
        """The precision of forwards on a device."""
        if self.given is not None:
            return self.given.dtype
        return torch.bfloat16 if device.type != "cuda" or torch.cuda.is_bf16_supported() else torch.float16

    @property
    def may_scale(self) -> bool:
        """Can a forward on a device of this machine be one in float16?"""
        return SCALED in {
            self.dtype(torch.device(kind)) for kind in ("cpu", "cuda") if kind == "cpu" or torch.cuda.is_available()
        }

    def begin(self, module: nn.Module, device: torch.device, ended: Callable[[], None]) -> None:
        """A forward of `module`, whose parameters are on `device`, is about to run; `ended` hears of its end."""
        self._sweep()
        ours = _here.depth > 0
        if torch.is_autocast_enabled(device.type) and not ours:
            return
        dtype = self.dtype(device)
        if dtype is SCALED and self.scale not in _here.scales:
            _here.scales.append(self.scale)
        if ours:
            # Two optimizers share the model: one region is enough, and both scale.
            return
        region = torch.autocast(device.type, dtype=dtype)
        region.__enter__()
        _here.depth += 1
        self._local.region = region
        self._local.dtype, self._local.ended = dtype, ended
        # On the module for the time of this call only. On all modules it would cost each call 2 us.
        self._local.handle = self._put_on(module)

    def _put_on(self, module: nn.Module) -> RemovableHandle:
        """The hook on a module, by the handle that this thread has had for it before. A backward looks for hooks again whenever
        there is a new handle in the process (`lazy/node_hooks.py`): 0.2 ms for the 62 leaves of ResNet-18."""
        latest, handle = getattr(self._local, "latest", (None, None))
        if latest is None or handle is None or latest() is not module:
            handle = module.register_forward_hook(self._end, always_call=True)
            self._local.latest = weakref.ref(module), handle
        module._forward_hooks[handle.id] = self._end
        module._forward_hooks_always_called[handle.id] = True
        return handle

    def _end(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not self.inside:
            return None
        handle, dtype = self._local.handle, self._local.dtype
        self._leave()
        if output is None:
            self._left.append(handle)
            return None
        handle.remove()
        return _in_float32(output, dtype)

    def _leave(self) -> None:
        region, self._local.region = self._local.region, None
        _here.depth -= 1
        region.__exit__(None, None, None)
        self._local.ended()

    def close(self) -> None:
        """The step is over: end what an interrupted forward has left open, and scale no backward any more."""
        if self.inside:
            self._left.append(self._local.handle)
            self._leave()
        self._sweep()
        if self.scale in _here.scales:
            _here.scales.remove(self.scale)

    def _sweep(self) -> None:
        while self._left:
            self._left.pop().remove()


def scales_in_use() -> list[LossScale]:
    """Of this thread: a backward now belongs to forwards whose gradients they scale."""
    return _here.scales


def _in_float32(output: Any, dtype: torch.dtype) -> Any:
    """Results in float32, so that a loss outside of autocast is computed as autocast would compute it.

    A model that returns its loss has computed it already: the rest is for looking at, and stays as it is.
    """

    def cast(tensor: Tensor) -> Tensor:
        return tensor.float() if tensor.dtype is dtype else tensor

    if isinstance(output, Tensor):
        return cast(output)
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    if any(not leaf.dim() and leaf.requires_grad for leaf in leaves):
        return output
    return tree_map_only(Tensor, cast, output)
