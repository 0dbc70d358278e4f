"""A default device is a mode of torch's beneath the lane. It is to see what the program calls, and nothing else."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from kitsune.lazy.hands_off import HARMLESS

_is_on, _Off, _On = torch._C._is_torch_function_mode_enabled, torch._C.DisableTorchFunction, torch._C._EnableTorchFunction


def device_beneath(lane: Any) -> torch.device | None:
    """Where factories make tensors by default, if that is said beneath the lane, which does not see it."""
    for mode in _get_current_function_mode_stack():
        if type(mode) is DeviceContext:
            return mode.device
        if mode is lane:
            break
    return None


def shield(recorder: Any) -> torch.device | None:
    """Have no such mode see what the code of the recorder and its lane asks of tensors; returns that device.

    It hands on what it sees to the doors, as if the program had asked: the storage of a result, asked for in the middle of a
    flush, flushed once more, and random numbers were drawn twice. In what is handed on to torch, or to Python of others, it is
    on.
    """
    lane = recorder.lane
    device = device_beneath(lane)
    for owner, methods in ((recorder, _OF_RECORDER), (lane, _OF_LANE)) if lane else ():
        for name, method in methods.items():
            if device is None:
                vars(owner).pop(name, None)
            else:
                setattr(owner, name, MethodType(method, owner))
    return device


def record_shielded(recorder: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    if not _is_on():
        return type(recorder).record(recorder, func, types, args, kwargs)
    with _unseen(recorder):
        return type(recorder).record(recorder, func, types, args, kwargs)


@contextmanager
def _with_bits(recorder: Any) -> Iterator[None]:
    with type(recorder).with_bits(recorder), _seen_again(recorder):
        yield


def _flush(recorder: Any, *args: Any, **kwargs: Any) -> None:
    with _Off():
        type(recorder).flush(recorder, *args, **kwargs)


def _call(lane: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    # Those are handed on as they come. (And of a device that began inside of the context torch asks first.)
    if func in HARMLESS or lane.recorder.paused or not _is_on():
        return type(lane).call(lane, func, types, args, kwargs)
    with _unseen(lane):
        return type(lane).call(lane, func, types, args, kwargs)


def _made(lane: Any, func: Any, args: Any = (), kwargs: Any = None) -> Any:
    with _seen_again(lane):
        return type(lane).made(lane, func, args, kwargs)


@contextmanager
def _unseen(owner: Any) -> Iterator[None]:
    before, owner.is_shielded = owner.is_shielded, True
    try:
        with _Off():
            yield
    finally:
        owner.is_shielded = before


@contextmanager
def _seen_again(owner: Any) -> Iterator[None]:
    if not owner.is_shielded:
        yield
        return
    owner.is_shielded = False
    try:
        with _On():
            yield
    finally:
        owner.is_shielded = True


_OF_RECORDER: dict[str, Callable[..., Any]] = {
    "record": record_shielded,
    "__torch_dispatch__": record_shielded,
    "flush": _flush,
    "with_bits": _with_bits,
}
_OF_LANE: dict[str, Callable[..., Any]] = {"__torch_function__": _call, "made": _made}
