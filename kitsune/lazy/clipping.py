"""Clipping by the norm of all gradients is followed as one call: it makes 12 of torch's API, and asks for 40 attributes."""

import functools
from types import GeneratorType
from typing import Any

import torch

from kitsune.lazy.open_lanes import on_top
from kitsune.lazy.replaced import Named
from kitsune.lazy.tensor import LazyTensor
from kitsune.lazy.updates import AGAIN, TRIES

_ORIGINAL: Any = torch.nn.utils.clip_grad_norm_
_NAMED = Named(_ORIGINAL)


class _Owner:
    """Has a gradient, which is all that clipping asks a parameter for."""

    __slots__ = ("grad",)

    def __init__(self, grad: Any) -> None:
        self.grad = grad


def clipping_door(original: Any) -> Any:
    """`clip_grad_norm_`."""
    if original is not _ORIGINAL:
        return original

    def clip_grad_norm_(grads: Any, *options: Any) -> Any:
        return original([_Owner(grad) for grad in grads], *options)

    @functools.wraps(original)
    def door(parameters: Any, max_norm: Any, norm_type: Any = 2.0, error_if_nonfinite: Any = False, foreach: Any = None) -> Any:
        options = (max_norm, norm_type, error_if_nonfinite, foreach)
        lane = on_top()
        if lane is None or lane.inside or lane.recorder.paused or not _NAMED.are_torchs():
            return original(parameters, *options)
        if type(parameters) is GeneratorType:
            # Torch tells one that is empty from other empty things.
            parameters = list(parameters) or _nothing()
        grads = _recorded(parameters)
        if not grads or _is_in_vain(lane, clip_grad_norm_):
            return original(parameters, *options)
        n_followed = lane.recorder.tally.followed
        # Reading gradients and their devices would be calls of the API.
        with torch._C.DisableTorchFunction():
            norm = lane.call(clip_grad_norm_, (), (grads, *options))
        if lane.recorder.tally.followed > n_followed:
            lane.failures[clip_grad_norm_] = 0
        return norm

    return door


def _nothing() -> Any:
    """A generator that is empty."""
    yield from ()


def _recorded(parameters: Any) -> list[Any] | None:
    """The gradients, if each is what a region has made, this one or one before: others may look at calls themselves."""
    if type(parameters) is not list:
        return None
    with torch._C.DisableTorchFunction():
        grads = [grad for parameter in parameters if (grad := parameter.grad) is not None]
        return grads if all(type(grad) is LazyTensor and not grad.requires_grad for grad in grads) else None


def _is_in_vain(lane: Any, func: Any) -> bool:
    """Was it not known for long, with another norm each time for instance? Then the calls that it makes are looked at."""
    n_failures = lane.failures.get(func, 0)
    lane.failures[func] = n_failures + 1
    return n_failures >= TRIES and bool(n_failures % AGAIN)
