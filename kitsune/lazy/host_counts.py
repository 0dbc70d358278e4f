"""Optimizers that count their steps on the host: what they do there, and the numbers that their updates get from it.

The numbers are worked out as torch works them out, to the bit. If they were others, they would explain none of the update's
numbers, and the update would be made by torch each time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

# Parameters that join later, as layers that are unfrozen one by one, have taken fewer steps.
MAX_DISTINCT = 8
# Whole numbers below it can be counted on in single precision: at it one more is none, and 1.1 is another number there.
MOST_STEPS = 2**24
# Not the method, which is a door.
_numbers_in = torch._C.TensorBase.tolist
# In which torch counts; integers cannot be counted up by a float, and halves end early.
_PRECISIONS = (torch.float32, torch.float64)
# Made once, and not in each step.
_ONE = torch.ones((), dtype=torch.float32, device="cpu")


def _adam(step: float, beta1: float, beta2: float, lr: float, weight_decay: float, **_: Any) -> list[float]:
    first, second = 1 - beta1**step, 1 - beta2**step
    return [lr / first, second**0.5, 1 - lr * weight_decay]


def _adamax(step: float, beta1: float, lr: float, **_: Any) -> list[float]:
    return [lr / (1 - beta1**step)]


def _adagrad(step: float, lr: float, lr_decay: float, **_: Any) -> list[float]:
    return [lr / (1 + (step - 1) * lr_decay)]


def _none(_step: float, **_: Any) -> list[float]:
    return []


class _Family(NamedTuple):
    """Updates of one kind: where the parameters' counts are among the arguments, and what is worked out from one of them."""

    position: int
    numbers: Callable[..., list[float]]
    options: tuple[str, ...] = ()


_ADAM = _Family(5, _adam, ("beta1", "beta2", "lr", "weight_decay"))
_FAMILIES = {
    "adam": _ADAM,
    "adamw": _ADAM,
    "adamax": _Family(4, _adamax, ("beta1", "lr")),
    "adagrad": _Family(3, _adagrad, ("lr", "lr_decay")),
    "adadelta": _Family(4, _none),
    "rmsprop": _Family(5, _none),
}


@dataclass(frozen=True, slots=True)
class HostCounts:
    """The part of one update that is done on the host: what it is called, the counts, and the numbers that it is given.

    `steps` says how many have been taken, each number once, and `pattern` which of these is that of each count; `numbers` is what
    follows from all of that.
    """

    name: str
    counts: list[torch.Tensor]
    # A weight decay of zero is mostly an integer.
    options: dict[str, float]
    steps: list[float]
    pattern: tuple[int, ...]
    numbers: list[float]

    def advance(self) -> None:
        """Count the step, as the update would."""
        count_steps(self.counts)


def count_steps(counts: list[torch.Tensor]) -> None:
    """Count a step of each."""
    with torch.no_grad(), torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
        torch._foreach_add_(counts, _ONE, alpha=1.0)


def read_steps(counts: list[torch.Tensor]) -> tuple[list[float], tuple[int, ...]]:
    """How many steps have been taken, each number once, and of each count which of these it is."""
    with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch(), torch.no_grad():
        steps = _numbers_in(torch.stack(counts))
    distinct = list(dict.fromkeys(steps))
    return distinct, (0,) * len(steps) if len(distinct) == 1 else tuple(map(distinct.index, steps))


def numbers_of(name: str, steps: list[float], options: dict[str, float]) -> list[float] | None:
    """What an update that is called so works out after so many steps; None if that cannot be said."""
    if len(steps) > MAX_DISTINCT or not all(0 <= step < MOST_STEPS and step.is_integer() for step in steps):
        return None
    try:
        return [number for step in steps for number in _FAMILIES[name].numbers(step + 1, **options)]
    except (ZeroDivisionError, OverflowError):
        return None


def host_counts(func: Any, args: Any, kwargs: Any) -> HostCounts | None:
    """What the update with these arguments does on the host; None if nothing, or if that is not known."""
    family = _FAMILIES.get(func.__name__)
    if family is None or len(args) <= family.position or kwargs.get("fused") or kwargs.get("capturable"):
        return None
    counts, options = args[family.position], {k: v for k, v in kwargs.items() if type(v) in (float, int)}
    if not options.keys() >= set(family.options) or not are_counts(counts) or any(t.dtype not in _PRECISIONS for t in counts):
        return None
    steps, pattern = read_steps(counts)
    numbers = numbers_of(func.__name__, steps, options)
    return None if numbers is None else HostCounts(func.__name__, counts, options, steps, pattern, numbers)


def are_counts(tensors: Any) -> bool:
    """Is this a list of numbers on the CPU?"""
    return bool(tensors) and all(type(t) is torch.Tensor and not t.dim() and t.device.type == "cpu" for t in tensors)
