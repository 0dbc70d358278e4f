"""The contexts that are open in a thread: when its ops are taken, and when they are left to eager in between."""

import os
import threading
import weakref
from typing import Any, TypeVar

import torch
from torch.optim.optimizer import _global_optimizer_post_hooks
from torch.utils._foreach_utils import _foreach_supported_types

from kitsune.config import config
from kitsune.dispatch import foreign_modes
from kitsune.garbage import threshold
from kitsune.global_hooks import GlobalHook
from kitsune.ir import Barrier, plain_times
from kitsune.lazy import LazyTensor, close_doors, keep, open_doors, renew_lock, settle_grads, settle_state
from kitsune.pipeline import Pipeline

# torch's optimizers and clip_grad_norm_ take their multi-tensor path only for types on this list.
_foreach_supported_types.append(LazyTensor)

T = TypeVar("T")


class Here(threading.local):
    """The pipelines of one thread: kept between contexts, for what they know of regions; `depth` counts open contexts."""

    def __init__(self) -> None:
        self.pipelines: dict[Any, Pipeline] = {}
        self.depth: dict[Pipeline, int] = {}
        # What the program has, while it has been given another.
        self.view_replay: bool | None = None
        # Is a call being made that is left to eager without a context? How many contexts were opened that are in no other; the
        # steps of optimizers in the last of them, and the last optimizer.
        self.in_left_call, self.n_opened, self.n_steps = False, 0, 0
        self.stepped: weakref.ref[Any] | None = None


here = Here()
everyone: "weakref.WeakSet[Pipeline]" = weakref.WeakSet()
_lock = threading.Lock()
# Those with an open context, in all threads.
_open: set[Pipeline] = set()
# What the stance asks of every pipeline: to take nothing, and what becomes of ops that are not known ("record" them, leave
# them to "eager", "fail").
_forced_eager = False
_on_new = "record"


class Entry:
    """What a context has entered: its pipeline, and once it is being left, how many contexts of the pipeline stay open."""

    def __init__(self, pipeline: Pipeline | None) -> None:
        self.pipeline = pipeline
        self.rest: int | None = None


def entered(context: T, pipeline: Pipeline | None, stack: list[Entry]) -> T:
    """The context, which is open in this thread now and has its pipeline on its stack; or neither, where an interrupt has come:
    that may be at any line, and Python calls no `__exit__` of what was not entered."""
    n, depth = len(stack), 0 if pipeline is None else here.depth.get(pipeline, 0)
    try:
        if pipeline is not None:
            here.depth[pipeline] = depth + 1
            if not depth:
                _open_first(pipeline)
        stack.append(Entry(pipeline))
        return context
    except BaseException:
        del stack[n:]
        if pipeline is not None:
            here.depth[pipeline] = depth + 1
            _close(pipeline, depth)
        raise


def left(stack: list[Entry], n: int) -> None:
    """The `n`th entry of this stack is left in this thread, and what it recorded has been run. After an interrupt at any line it
    may be called again, and does the rest."""
    while len(stack) >= n:
        entry = stack[-1]
        if entry.pipeline is not None:
            if entry.rest is None:
                entry.rest = here.depth.get(entry.pipeline, 1) - 1
            _close(entry.pipeline, entry.rest)
        stack.pop()


def _open_first(pipeline: Pipeline) -> None:
    for other in here.depth:
        # From here on the inner pipeline sees the ops: nothing that it reads may still be pending in an outer one.
        if other is not pipeline:
            other.recorder.flush(Barrier.NESTED)
            other.stop_following()
            # Nor does its lane see what becomes of gradients from here on.
            keep([leaf.grad for leaf in other.recorder.leaves.living()])
    if len(here.depth) == 1:
        here.n_opened, here.n_steps, here.stepped = here.n_opened + 1, 0, None
    with _lock:
        first, pipeline.lane.beneath = not _open, None
        _open.add(pipeline)
        _step_hook.put_on()
    if first:
        # Not under the lock: a collection may run anybody's finalizers.
        threshold.begin()
    if _wanted(pipeline):
        _turn_on(pipeline)


def _close(pipeline: Pipeline, rest: int) -> None:
    """A context is left in this thread, and `rest` of them stay open. It may be open in part."""
    if rest:
        here.depth[pipeline] = rest
        return
    try:
        if pipeline.on or pipeline.closing:
            _turn_off(pipeline)
    finally:
        _closed(pipeline)


def _closed(pipeline: Pipeline) -> None:
    """The thread is as plain PyTorch has it, or as an outer context has it."""
    with _lock:
        _open.discard(pipeline)
        if not _open:
            _step_hook.take_off()
            threshold.end()
    was_open = here.depth.pop(pipeline, 0)
    if here.depth:
        outer = next(reversed(here.depth))
        if outer.on:
            outer.follow()
    elif was_open and not (here.in_left_call or pipeline.insists or plain_times.is_plain()) and _gated():
        pipeline.gate.end_of_context()


def _turn_on(pipeline: Pipeline) -> None:
    """Take the ops of this thread from here on."""
    first = not any(other.on for other in here.depth)
    # Before anything else: whatever has come to be done by an interrupt, `_turn_off` undoes.
    pipeline.on, pipeline.closing = True, False
    pipeline.recorder.on_new = _on_new
    pipeline.recorder.restart()
    open_doors(pipeline.recorder)
    if first:
        # A view of a view is replayed from its base's ops: as_strided on a wrapper without memory would be refused.
        if here.view_replay is None:
            here.view_replay = torch._C._is_view_replay_enabled()
        torch._C._set_view_replay_enabled(True)
    if pipeline.left_behind:
        pipeline.left_behind = False
        pipeline.recorder.resume()
    pipeline.enter()


def _turn_off(pipeline: Pipeline, for_good: bool = False) -> None:
    """Leave this thread as plain PyTorch has it, with no mode and no door; nothing may be pending."""
    # Each is done whatever becomes of the others: an interrupt may come at any line. Then all is done again.
    try:
        try:
            try:
                pipeline.on, pipeline.closing = False, True
                gone = pipeline.leave(for_good) and not _in_backward()
                if not gone and not pipeline.left_behind:
                    pipeline.left_behind = True
                    pipeline.recorder.pause()
            finally:
                _restore_views()
        finally:
            close_doors(pipeline.recorder, for_good)
    finally:
        settle_grads(pipeline.recorder.leaves.living())
        pipeline.recorder.take_leaves()
    pipeline.closing = False


def _in_backward() -> bool:
    """Will torch put modes and flags back as they were, after the node of a backward that is running now?"""
    return torch._C._current_graph_task_id() != -1


def _restore_views() -> None:
    if here.view_replay is not None and not any(other.on for other in here.depth):
        torch._C._set_view_replay_enabled(here.view_replay)
        if not _in_backward():
            here.view_replay = None


def _wanted(pipeline: Pipeline) -> bool:
    return not _forced_eager and (pipeline.gate.records or pipeline.insists or not _gated())


def is_left(pipeline: Pipeline) -> bool:
    """Would a context be open for nothing but to tell the gate of a step?"""
    gate, usual = pipeline.gate, not _forced_eager and _on_new == "record"
    return gate.left is not None and not here.depth and usual and _gated() and not (gate.records or pipeline.insists)


def _gated() -> bool:
    """May the gate decide? Not while every run is checked: it would find that slower than eager."""
    return config.gate and not config.check


def _end_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    pipelines = list(here.depth)
    if not pipelines:
        return
    here.n_steps, here.stepped = here.n_steps + 1, weakref.ref(optimizer)
    if any(pipeline.on for pipeline in pipelines):
        with torch._C.DisableTorchFunction():
            for pipeline in pipelines:
                pipeline.recorder.flush(Barrier.STEP)
            settle_state(optimizer)
        for pipeline in pipelines:
            if pipeline.recorder.watcher is not None:
                pipeline.recorder.watcher.stepped(optimizer)
    # With contexts in each other, an inner one that is left to eager would only be recorded by the outer one.
    if len(pipelines) == 1 and _may_turn(pipelines[0]):
        _look_at_gate(pipelines[0], optimizer)


_step_hook = GlobalHook(_global_optimizer_post_hooks, _end_step)


def _look_at_gate(pipeline: Pipeline, optimizer: torch.optim.Optimizer) -> None:
    gate = pipeline.gate
    # While a stance other than the default is set, steps are not what they would be without it: they decide nothing.
    if _gated() and not pipeline.insists and not _forced_eager and _on_new == "record" and pipeline.on is gate.records:
        gate.end_of_step(optimizer)
    if pipeline.on is not _wanted(pipeline):
        _turn(pipeline)
        if gate.left is not None and not pipeline.on:
            # Eager may need the memory.
            pipeline.runner.forget()


def free_to_skip() -> bool:
    """May a call do without Python in this thread? Not in a context, nor where plain PyTorch is asked for or captured."""
    return not here.depth and not _forced_eager and not plain_times.is_plain()


def _turn(pipeline: Pipeline) -> None:
    if pipeline.on:
        _turn_off(pipeline, for_good=True)
    elif not foreign_modes():
        _turn_on(pipeline)


def _may_turn(pipeline: Pipeline) -> bool:
    """Is this a place between two steps? An optimizer may step inside of a backward (in the hook of a gradient), whose modes
    torch puts back after each node, inside of a call that is being taken, or while the program has recording switched off."""
    recorder, lane = pipeline.recorder, pipeline.lane
    return not (
        recorder.paused
        or recorder.running
        or recorder.inferring
        or recorder.region.node.depth
        or lane.inside
        or _in_backward()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or plain_times.is_plain()
    )


def apply_stance(forced_eager: bool, on_new: str) -> None:
    """A stance is set: for contexts of this thread from here on, for those of others from their next step or context on."""
    global _forced_eager, _on_new
    _forced_eager, _on_new = forced_eager, on_new
    for pipeline in list(everyone):
        pipeline.recorder.on_new = on_new
    for pipeline in list(here.depth):
        if pipeline.on is not _wanted(pipeline):
            pipeline.recorder.flush(Barrier.FORCED)
            if _may_turn(pipeline):
                _turn(pipeline)


def _before_fork() -> None:
    # A child inherits wrappers, but must not run the region: OpenMP hangs in it after a large product in the parent.
    for pipeline in list(everyone):
        pipeline.recorder.flush(Barrier.FORK)


def _in_forked_child() -> None:
    global _lock
    # Another thread, which is not there, may have held it; and the contexts of other threads are not open here.
    _lock = threading.Lock()
    _open.intersection_update(here.depth)
    # A DataLoader's worker inherits the mode of its parent's thread, but not the parent's consumer of the regions.
    renew_lock()
    for pipeline in list(everyone):
        pipeline.recorder.pause()
    # A context that the child enters itself gets a pipeline of its own.
    here.pipelines, here.in_left_call = {}, False


os.register_at_fork(before=_before_fork, after_in_child=_in_forked_child)
