"""Optimizers that count their steps on the host: what they do there, and the numbers that their updates get from it.

The numbers are worked out as torch works them out, to the bit. If they were others, they would explain none of the update's
numbers, and the update would be made by torch each time.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

# Parameters that join later, as layers that are unfrozen one by one, have taken fewer steps.
MAX_DISTINCT = 8
# Not the method, which is a door.
_numbers_in = torch._C.TensorBase.tolist
# The counts of the parameters, by the name of torch's function: position among its arguments.
_COUNTS = {"adam": 5, "adamw": 5}


def _adam(step: float, beta1: float, beta2: float, lr: float, weight_decay: float, **_: Any) -> list[float]:
    first, second = 1 - beta1**step, 1 - beta2**step
    return [lr / first, second**0.5, 1 - lr * weight_decay]


_NUMBERS: dict[str, Callable[..., list[float]]] = {"adam": _adam, "adamw": _adam}


class HostCounts:
    """The part of one update that is done on the host. `pattern` tells which parameters have taken equally many steps."""

    def __init__(self, counts: list[torch.Tensor], pattern: tuple[int, ...], numbers: list[float]) -> None:
        self._counts, self.pattern, self.numbers = counts, pattern, numbers

    def advance(self) -> None:
        """Count the step, as the update would."""
        with torch.no_grad(), torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
            torch._foreach_add_(self._counts, torch.tensor(1.0, device="cpu"), alpha=1.0)


def may_count(func: Any, kwargs: Any) -> bool:
    """May the update with these options do work on the host?"""
    return func.__name__ in _COUNTS and not kwargs.get("fused") and not kwargs.get("capturable")


def host_counts(func: Any, args: Any, kwargs: Any) -> HostCounts | None:
    """What the update with these arguments does on the host; None if nothing, or if that is not known."""
    name = func.__name__
    position = _COUNTS.get(name, len(args))
    if len(args) <= position or not may_count(func, kwargs):
        return None
    counts, floats = args[position], {k: v for k, v in kwargs.items() if type(v) is float}
    if not {"beta1", "beta2", "lr", "weight_decay"} <= floats.keys() or not are_counts(counts):
        return None
    with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch(), torch.no_grad():
        steps = _numbers_in(torch.stack(counts))
    distinct = list(dict.fromkeys(steps))
    if len(distinct) > MAX_DISTINCT or not all(map(math.isfinite, distinct)):
        return None
    try:
        numbers = [number for step in distinct for number in _NUMBERS[name](step + 1, **floats)]
    except (ZeroDivisionError, OverflowError):
        return None
    return HostCounts(counts, tuple(map(distinct.index, steps)), numbers)


def are_counts(tensors: Any) -> bool:
    """Is this a list of numbers on the CPU?"""
    return bool(tensors) and all(type(t) is torch.Tensor and not t.dim() and t.device.type == "cpu" for t in tensors)
