"""Ways to the autograd graph that calls of torch's API do not show: while a call lane is open, they tell it first."""

import functools
import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch._functorch.eager_transforms
import torch._functorch.vmap
from torch.utils._python_dispatch import TorchDispatchMode

from kitsune.ir import Barrier
from kitsune.lazy.call_lane import CallLane
from kitsune.lazy.casts import comes, forgotten, goes, note_forgotten
from kitsune.lazy.door_set import Door, DoorSet
from kitsune.lazy.matcher_steps import MISS
from kitsune.lazy.module_calls import at_first
from kitsune.lazy.open_lanes import lanes
from kitsune.lazy.optimizer_doors import optimizer_doors
from kitsune.lazy.replaced import is_torchs
from kitsune.lazy.trusted_modules import KNOWN
from kitsune.lazy.used_again import drop_gradients

_n_modes, _mode_at = torch._C._len_torch_function_stack, torch._C._get_function_stack_at
_modes_are_on = torch._C._is_torch_function_mode_enabled
_here = threading.local()
_open: set[CallLane] = set()
_lock = threading.Lock()


def open_graph_doors(lane: CallLane) -> None:
    """Watch for a lane of this thread."""
    lanes().append(lane)
    comes(lane)
    with _lock:
        _open.add(lane)
        _DOORS.put_on()


def close_graph_doors(lane: CallLane, for_good: bool = False) -> None:
    """Stop watching; see `close_doors`."""
    if lane in lanes():
        goes(lane)
        lanes().remove(lane)
    with _lock:
        _open.discard(lane)
        if not _open:
            _DOORS.may_go(for_good)


def _lost_track(original: Any) -> Any:
    @functools.wraps(original)
    def door(*args: Any, **kwargs: Any) -> Any:
        for lane in lanes():
            lane.lose_track()
        return original(*args, **kwargs)

    return door


def _backward(original: Any) -> Any:
    torchs = is_torchs(original)

    @functools.wraps(original)
    def door(
        tensors: Any,
        grad_tensors: Any = None,
        retain_graph: Any = None,
        create_graph: Any = False,
        grad_variables: Any = None,
        inputs: Any = None,
    ) -> Any:
        def run() -> Any:
            return original(tensors, grad_tensors, retain_graph, create_graph, grad_variables, inputs)

        if not lanes():
            return run()
        plain = torchs and not retain_graph and not create_graph and grad_variables is None and inputs is None
        return lanes()[-1].backward(run, tensors, grad_tensors, plain)

    return door


def _mode_entered(original: Any) -> Any:
    """Somebody is to see every op: no call is followed until that ends."""

    @functools.wraps(original)
    def door(mode: Any) -> Any:
        # Torch's inference for the recorder enters one too.
        open_lanes = [lane for lane in lanes() if not lane.recorder.inferring and not lane.recorder.running]
        aside: list[tuple[Any, Any]] = []
        for lane in open_lanes:
            lane.lose_track()
            goes(lane)
            aside += [(lane, lane)] * lane.leave()
            # Torch's own (fake tensors, tracing) stand below all others, and would see no op that is recorded.
            if getattr(mode, "_mode_key", None) is not None and lane.recorder.is_on_top():
                lane.recorder.flush(Barrier.FOREIGN_MODE)
                aside += [(lane, lane.recorder)] * lane.recorder.leave()
        _here.aside = [*getattr(_here, "aside", ()), aside]
        return original(mode)

    return door


def _mode_left(original: Any) -> Any:
    @functools.wraps(original)
    def door(*args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        finally:
            aside = getattr(_here, "aside", ())
            for lane, one in aside.pop() if aside else ():
                if lane in lanes():
                    one.enter()
                    if one is lane:
                        comes(lane)

    return door


def _casts(original: Any) -> Any:
    @functools.wraps(original)
    def door() -> None:
        original()
        note_forgotten()
        for lane in lanes():
            forgotten(lane)

    return door


def _modes(original: Any) -> Any:
    @functools.wraps(original)
    def door(*args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        finally:
            for lane in lanes():
                lane.read_modes()

    return door


def _python_calls(original: Any) -> Any:
    """torch's functions in Python come to a mode by a detour in Python, which a call that is known can do without."""

    @functools.wraps(original)
    def door(public_api: Any, relevant_args: Any, *args: Any, **kwargs: Any) -> Any:
        # As in `on_top`, in one frame.
        n = _n_modes()
        lane: Any = _mode_at(n - 1) if n and _modes_are_on() else None
        if isinstance(lane, CallLane):
            recorder = lane.recorder
            region = recorder.region
            node = region.node
            matcher = node.matchers.get(public_api)
            if matcher is not None and not recorder.paused and region.deferred is None:
                result = matcher(lane, region, node, args, kwargs)
                if result is not MISS:
                    return result
        return original(public_api, relevant_args, *args, **kwargs)

    return door


def _module_called(original: Any) -> Any:
    """Where torch's own modules are called whose Python a known call can do without."""

    @functools.wraps(original)
    def door(module: Any, *args: Any, **kwargs: Any) -> Any:
        n = _n_modes()
        lane: Any = _mode_at(n - 1) if n and _modes_are_on() else None
        if type(module) in KNOWN and isinstance(lane, CallLane):
            recorder = lane.recorder
            region = recorder.region
            node = region.node
            taker = node.matchers.get(id(module)) or at_first(node, module)
            if not recorder.paused and region.deferred is None:
                result = taker(lane, region, node, module, args, kwargs)
                if result is not MISS:
                    return result
        # Who puts something in its place sees each call: `torch.fx` does while it traces.
        return torch.nn.Module.__call__(module, *args, **kwargs)

    return door


def _gradients_dropped(original: Any) -> Any:
    """It reads and sets gradients by the hundred, at 1 us each while calls are looked at."""
    if not is_torchs(original):
        return original

    @functools.wraps(original)
    def door(module: Any, set_to_none: bool = True) -> None:
        if not lanes():
            return original(module, set_to_none)  # type: ignore[no-any-return]
        with torch._C.DisableTorchFunction():
            if set_to_none is not True or getattr(module, "_is_replica", False):
                return original(module, set_to_none)  # type: ignore[no-any-return]
            return drop_gradients(list(module.parameters()))

    return door


# A transform of torch.func begins: what it is given must have its history. (Under the names that torch's modules call.)
FUNCTORCH = (
    (torch._functorch.vmap, "_vmap_increment_nesting"),
    (torch._functorch.eager_transforms, "_grad_increment_nesting"),
    (torch._functorch.eager_transforms, "_jvp_increment_nesting"),
    (torch._functorch.eager_transforms, "_func_increment_nesting"),
)


def _doors() -> Iterator[Door]:
    # `Function.apply` asks this first, also where a program has bound it beforehand.
    yield torch._C, "_are_functorch_transforms_active", _lost_track
    yield from ((module, name, _lost_track) for module, name in FUNCTORCH if hasattr(module, name))
    yield torch.autograd, "backward", _backward
    yield torch._C._autograd, "_push_saved_tensors_default_hooks", _lost_track
    yield TorchDispatchMode, "__enter__", _mode_entered
    yield TorchDispatchMode, "__exit__", _mode_left
    yield torch, "clear_autocast_cache", _casts
    for name in "enabled dtype cache_enabled cpu_enabled gpu_dtype cpu_dtype xla_enabled xla_dtype ipu_enabled ipu_dtype".split():
        if hasattr(torch, f"set_autocast_{name}"):
            yield torch, f"set_autocast_{name}", _modes
    yield from optimizer_doors()
    yield torch.nn.Module, "zero_grad", _gradients_dropped
    yield from ((cls, "__call__", _module_called) for cls in KNOWN)
    for functions in (torch.functional, torch.nn.functional, torch._tensor):
        yield functions, "handle_torch_function", _python_calls
    for scripted in ("ScriptFunction", "ScriptMethod"):
        yield getattr(torch._C, scripted), "__call__", _lost_track


_DOORS = DoorSet(_doors)
