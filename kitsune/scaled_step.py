"""A step whose gradients were scaled: it is skipped where one of them was not finite, on the device if the optimizer can."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import LBFGS, SGD, Optimizer

from kitsune.amp import LossScale


def scaled_step(optimizer: Optimizer, scale: LossScale, closure: Callable[[], Any] | None, kwargs: dict[str, Any]) -> Any:
    """The optimizer's step, or none after an overflow. Returns what the closure does, if there is one."""
    loss = None
    if closure is not None:
        loss, closure = _evaluated(optimizer, closure), None
    if not scale.waiting:
        optimizer.step(**kwargs)
        return loss
    found = scale.found()
    assert found is not None
    # Before the step, which ends the recording: one region, and one graph, for all of it.
    scale.update()
    if getattr(optimizer, "_step_supports_amp_scaling", False) and not _would_make_buffers(optimizer):
        _step_on_the_device(optimizer, found, kwargs)
    elif not found.item():
        optimizer.step(**kwargs)
    return loss


def _would_make_buffers(optimizer: Optimizer) -> bool:
    """A fused SGD makes momentum buffers in its first step, and leaves them as they come if that one is skipped."""
    return isinstance(optimizer, SGD) and not optimizer.state and any(group["momentum"] for group in optimizer.param_groups)


def check_place(scale: LossScale) -> None:
    """Raises inside of a backward, whose recording goes on."""
    if scale.busy:
        raise RuntimeError(
            "step() was called inside of a backward whose gradients are scaled and not divided yet (in a hook of a parameter, "
            "for instance). Call it after backward(), or use AMPConfig(dtype=torch.bfloat16), which needs no scale."
        )


def _evaluated(optimizer: Optimizer, closure: Callable[[], Any]) -> Any:
    """A closure's loss. torch's optimizers evaluate one closure before they read a gradient, but LBFGS many in between."""
    if isinstance(optimizer, LBFGS) or not type(optimizer).__module__.startswith("torch.optim"):
        raise RuntimeError(
            f"{type(optimizer).__name__} may evaluate its closure several times in a step, of which none can be skipped alone "
            "when a float16 gradient overflows: use AMPConfig(dtype=torch.bfloat16), or enable_amp=False."
        )
    with torch.enable_grad():
        return closure()


def _step_on_the_device(optimizer: Any, found: torch.Tensor, kwargs: dict[str, Any]) -> None:
    # The protocol of GradScaler: a fused kernel reads whether to do anything.
    optimizer.grad_scale, optimizer.found_inf = None, found
    try:
        optimizer.step(**kwargs)
    finally:
        del optimizer.grad_scale, optimizer.found_inf
