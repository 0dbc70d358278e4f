"""The scale of float16 gradients: it grows and shrinks by the rule of `torch.amp.GradScaler`, and stays on the device.

It costs no wait for the device: what was not finite is a number there, a fused optimizer reads it there, and the rule itself is
one of torch's kernels. An optimizer that cannot read it has it read by the host once per step, as `GradScaler` does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from kitsune.amp.config import AMPConfig


class LossScale:
    """The scale of one optimizer's gradients. Nothing is on the device before the first backward."""

    def __init__(self, config: AMPConfig) -> None:
        self.config = config
        # What was loaded, or will be: (scale, steps in a row without an overflow).
        self._initial = (config.init_scale, 0)
        self._scale: Tensor | None = None
        self._tracker: Tensor | None = None
        # Since the last step: per device 1.0 if a gradient was not finite; empty if there was no backward.
        self._found: dict[torch.device, Tensor] = {}
        self._skipped: Tensor | None = None
        # A backward is running whose gradients are not divided yet.
        self.busy = False

    def on(self, device: torch.device) -> Tensor:
        """The scale, as a tensor on this device."""
        if self._scale is None:
            scale, clean = self._initial
            # Made at once, as plain tensors at one address for good, like parameters: a CUDA graph writes to them where they are.
            with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
                self._scale = torch.full((), scale, dtype=torch.float32, device=device)
                self._tracker = torch.full((), clean, dtype=torch.int32, device=device)
                self._skipped = torch.zeros((), dtype=torch.float32, device=device)
        return self._scale.to(device, non_blocking=True)

    @property
    def waiting(self) -> bool:
        """Was there a scaled backward that no step has followed yet?"""
        return bool(self._found)

    def note(self, found: dict[torch.device, Tensor]) -> None:
        """A scaled backward is done: 1.0 for a device where a gradient was not finite."""
        for device, one in found.items():
            known = self._found.get(device)
            self._found[device] = one if known is None else torch.maximum(known, one)

    def found(self) -> Tensor | None:
        """Above 0.0 if something was not finite since the last step; None if there was no backward."""
        total: Tensor | None = None
        for one in self._found.values():
            total = one if total is None else total + one.to(total.device, non_blocking=True)
        return total

    def update(self) -> None:
        """Shrink or grow: the step that `found` is for comes next, or is skipped."""
        found, self._found = self.found(), {}
        if found is None or self._scale is None or self._tracker is None or self._skipped is None:
            return
        config = self.config
        total = found.to(self._scale.device, non_blocking=True).clamp(max=1.0)
        self._skipped.add_(total)
        torch._amp_update_scale_(
            self._scale, self._tracker, total, config.growth_factor, config.backoff_factor, config.growth_interval
        )

    def state_dict(self) -> dict[str, Any]:
        """The scale and the steps in a row without an overflow, as numbers: the host waits for the device."""
        if self._scale is None or self._tracker is None:
            scale, clean = self._initial
        else:
            scale, clean = float(self._scale.item()), int(self._tracker.item())
        return {"scale": scale, "growth_tracker": clean}

    def skipped(self) -> int:
        """Steps that were skipped since the scale was made or loaded: the host waits for the device."""
        return 0 if self._skipped is None else int(self._skipped.item())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` has saved."""
        self._initial = (float(state["scale"]), int(state["growth_tracker"]))
        self._scale = self._tracker = self._skipped = None
        self._found = {}


def unscale(parameters: Iterable[Tensor], scale: Tensor) -> dict[torch.device, Tensor]:
    """Divide gradients in place; returns 1.0 for a device where one was not finite, 0.0 for others."""
    # In double precision, as GradScaler has it: a scale that is no power of two has no exact inverse.
    inverse, found = scale.double().reciprocal().float(), {}
    for (device, _), grads in _by_kind(parameters).items():
        if device not in found:
            found[device] = torch.zeros((), dtype=torch.float32, device=device)
        torch._amp_foreach_non_finite_check_and_unscale_(grads, found[device], inverse.to(device, non_blocking=True))
    return found


def _by_kind(parameters: Iterable[Tensor]) -> dict[tuple[torch.device, torch.dtype], list[Tensor]]:
    lists: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    # While calls are looked at, each of hundreds of these reads would be one.
    with torch._C.DisableTorchFunction():
        for parameter in parameters:
            grad = parameter.grad
            if grad is None:
                continue
            if grad.dtype is torch.float16:
                raise ValueError(
                    "enable_amp=True with float16 scales the gradients of float32 weights, but a parameter of shape "
                    f"{list(parameter.shape)} is float16 itself: keep the model in float32, or use "
                    "AMPConfig(dtype=torch.bfloat16)."
                )
            dense = grad._values() if grad.is_sparse else grad
            lists.setdefault((dense.device, dense.dtype), []).append(dense)
    return lists


def smallest(scales: Sequence[LossScale], device: torch.device) -> Tensor:
    """One scale for a backward that several optimizers share: none of them overflows because of another's."""
    least = scales[0].on(device)
    for scale in scales[1:]:
        least = torch.minimum(least, scale.on(device))
    return least
