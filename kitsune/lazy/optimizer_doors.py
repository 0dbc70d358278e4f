"""What torch's optimizers do around an update: their lists, their marks for profilers, the gradients that they drop."""

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from kitsune.lazy.casts import written
from kitsune.lazy.clipping import clipping_door
from kitsune.lazy.open_lanes import lanes, on_top
from kitsune.lazy.replaced import Named, is_torchs
from kitsune.lazy.update_lists import make_lists
from kitsune.lazy.updates import take_update
from kitsune.lazy.used_again import drop_gradients

_profiled = torch.autograd._profiler_enabled
_Mark = torch._C._profiler._RecordFunctionFast


def _optimizers() -> list[Any]:
    """Those with an `_init_group` of their own, which torch.compile gives each once it has compiled something."""
    return [it for it in vars(torch.optim).values() if isinstance(it, type) and "_init_group" in vars(it)]


def _updates() -> Iterator[tuple[Any, str]]:
    for optimizer in _optimizers():
        # The update is a function named like the module that both are in.
        module = sys.modules[optimizer.__module__]
        name = module.__name__.rpartition(".")[2]
        if inspect.isfunction(getattr(module, name, None)):
            yield module, name


_UPDATES = list(_updates())
# What they find under names, by function: not if that is not torch's.
_NAMED = {function: Named(function) for module, name in _UPDATES if is_torchs(function := getattr(module, name))}


def _lists(original: Any) -> Any:
    if not is_torchs(original):
        return original

    @functools.wraps(original)
    def door(self: Any, group: Any, *lists: Any) -> Any:
        if not lanes():
            return original(self, group, *lists)
        with torch._C.DisableTorchFunction():
            return make_lists(lanes()[-1].recorder, original, self, group, lists)

    return door


def _update(original: Any) -> Any:
    named = _NAMED.get(original)
    if named is None:
        return original

    @functools.wraps(original)
    def door(*args: Any, **kwargs: Any) -> Any:
        lane = on_top()
        if lane is None or not named.are_torchs():
            return original(*args, **kwargs)
        try:
            return take_update(lane, original, args, kwargs)
        finally:
            written(lane)

    return door


def _gradients_dropped(original: Any) -> Any:
    """`zero_grad`. Of the 40 us that it took for 6 gradients, most went into a mark and a look for dynamo."""
    if not is_torchs(original):
        return original

    @functools.wraps(original)
    def door(optimizer: Any, set_to_none: bool = True) -> None:
        if not lanes():
            return original(optimizer, set_to_none)  # type: ignore[no-any-return]
        with torch._C.DisableTorchFunction():
            # An optimizer that was unpickled by other means than torch's has its step wrapped here.
            if set_to_none is not True or _profiled() or not hasattr(optimizer, "_zero_grad_profile_name"):
                return original(optimizer, set_to_none)  # type: ignore[no-any-return]
            for group in optimizer.param_groups:
                drop_gradients(group["params"])
        return None

    return door


def _mark_begins(original: Any) -> Any:
    """A mark for profilers. As an op it costs 10 us, which only a profiler of torch's in this thread needs; others hear of it."""

    @functools.wraps(original)
    def door(mark: Any) -> Any:
        if not lanes():
            return original(mark)
        if not _profiled() and mark.name.startswith("Optimizer.") and mark.args is None:
            mark.run_callbacks_on_exit, mark.record = False, _Mark(mark.name)
            mark.record.__enter__()
            return mark
        with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
            return original(mark)

    return door


def _mark_ends(original: Any) -> Any:
    @functools.wraps(original)
    def door(mark: Any, *error: Any) -> Any:
        if type(mark.record) is _Mark:
            # With no door any more, torch leaves it to its end.
            mark.record.__exit__(*error)
            mark.record = None
            return None
        if not lanes():
            return original(mark, *error)
        with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
            return original(mark, *error)

    return door


def optimizer_doors() -> Iterator[tuple[Any, str, Callable[[Any], Any]]]:
    """Where they are: (owner, name, what makes the door from the original)."""
    yield torch.optim.Optimizer, "zero_grad", _gradients_dropped
    yield from ((optimizer, "_init_group", _lists) for optimizer in _optimizers())
    yield from ((*where, _update) for where in _UPDATES)
    for clips in (torch.nn.utils, torch.nn.utils.clip_grad):
        yield clips, "clip_grad_norm_", clipping_door
    yield torch.autograd.profiler.record_function, "__enter__", _mark_begins
    yield torch.autograd.profiler.record_function, "__exit__", _mark_ends
