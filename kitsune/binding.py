"""When the recording of an optimizer begins: at the first forward of a module that owns one of its parameters.

Mixed precision has another extent: each outermost forward of such a module, and no more than that.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _global_forward_pre_hooks
from torch.optim import Optimizer

from kitsune.amp import HalfForward
from kitsune.config import config
from kitsune.dispatch import foreign_modes
from kitsune.engine_options import DEFAULT, EngineOptions
from kitsune.global_hooks import GlobalHook

# A module that owns none of the parameters is asked again every so often, because modules can be put into it later.
ASK_AGAIN = 64
# Recordings of other optimizers after which one that has neither begun nor stepped meanwhile does not look into theirs any more.
PATIENCE = 16


class Verdict:
    """Whether a module owns a parameter of the optimizer and, if so, where the first one was found.

    What is `compiled` stays with torch.compile, which refuses to compile under a dispatch mode: it is not recorded.
    """

    __slots__ = ("compiled", "left", "module", "name", "owner")

    def __init__(self, module: weakref.ref[nn.Module], owner: nn.Module | None, name: str, compiled: bool) -> None:
        self.module, self.compiled = module, compiled
        self.owner = None if owner is None else weakref.ref(owner)
        self.name = name
        self.left = ASK_AGAIN


class Binding:
    """The modules that start the recording of one optimizer, and the recordings that are open, at most one per thread.

    It holds the optimizer weakly: the list of all bindings must keep no optimizer alive.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup: int | None = None,
        device: str | None = None,
        engine: EngineOptions = DEFAULT,
        amp: HalfForward | None = None,
        note: str = "",
    ) -> None:
        self.optimizer = weakref.ref(optimizer)
        self.warmup, self.device = warmup, device
        self.engine, self.amp, self.note = engine, amp, note
        self.roots: list[weakref.ref[nn.Module]] = []
        self.local = threading.local()
        # The threads that have a recording open.
        self.open_in: set[int] = set()
        # Recordings of others that have begun since this one last began or stepped.
        self.n_others = 0
        # Hears of the batches that the module is given which began the recording, if anybody wants to.
        self.batch: Callable[[Any], None] | None = None
        self._ids: set[int] = set()
        # By id, not by a WeakKeyDictionary: a module that defines __eq__ may have no hash.
        self._verdicts: dict[int, Verdict] = {}
        self.compiled = False
        self._context: AbstractContextManager[Any] | None = None

    @property
    def recording(self) -> bool:
        """Whether this thread has an open recording."""
        return hasattr(self.local, "recording")

    @property
    def waits(self) -> bool:
        """Is a forward somewhere to begin something? Asked of all threads.

        An optimizer that is not used any more waits between the recordings of others. Should it be used within them again, that
        step is not recorded by it, and those after it are. Mixed precision is no matter of time alone: it waits always.
        """
        if self.batch is not None or (self.amp is not None and not self.amp.inside):
            return True
        return not self.open_in and (self.n_others < PATIENCE or not any(binding.open_in for binding in _bindings))

    def open(self) -> None:
        # The session imports far more than a plain optimizer needs.
        from kitsune.session import Accelerate, note

        if self._context is None:
            self._context = Accelerate(self.warmup, self.device, options=self.engine)
        recording: AbstractContextManager[Any] = nullcontext() if self._is_open_by_hand() else self._context
        note(self.note)
        self.local.recording = recording
        try:
            recording.__enter__()
        except BaseException:
            # Also an interrupt: it has undone what it had done.
            del self.local.recording
            raise
        self._count()

    def _is_open_by_hand(self) -> bool:
        """Has the program opened a context here itself? Then that one takes the step, with its own options."""
        from kitsune.contexts import here

        if not here.depth:
            return False
        kinds = {pipeline.device.type for pipeline in here.depth if pipeline.runner.options == DEFAULT}
        return bool(kinds) and (self.device is None or torch.device(self.device).type in kinds)

    def close(self) -> None:
        """Ends what this thread has open, unless a backward is running, whose hooks may step: torch puts its modes back after
        each node, without the doors, and the rest of it is one of the step, too."""
        if torch._C._current_graph_task_id() == -1:
            self.end()
        elif self.amp is not None:
            self.amp.close()

    def end(self) -> None:
        """Ends what this thread has open; a recording of another thread can only be ended there."""
        if self.amp is not None:
            self.amp.close()
        recording = self.local.__dict__.pop("recording", None)
        self._count()
        if recording is not None:
            recording.__exit__(None, None, None)

    def _count(self) -> None:
        """This thread's recording has been opened or closed."""
        with _lock:
            (self.open_in.add if self.recording else self.open_in.discard)(threading.get_ident())
            for binding in _bindings if self.recording else ():
                binding.n_others += 1
            self.n_others = 0
            _place_hook()

    def attach(self, module: nn.Module) -> None:
        self.roots.append(weakref.ref(module))

    def forget(self) -> None:
        """The parameters have changed: every module is looked at again."""
        self._verdicts.clear()
        self.compiled = False

    def starts_at(self, module: nn.Module) -> Verdict | None:
        """Does a forward of this module begin something? The parameter that it was found by is in the verdict."""
        if self.roots and not any(root() is module for root in self.roots):
            return None
        verdict = self._verdicts.get(id(module))
        if verdict is None or verdict.module() is not module or not self._holds(verdict):
            verdict = self._look(module)
        return verdict if verdict.owner is not None else None

    def owns(self, module: nn.Module) -> bool:
        """Whether the module holds a parameter of the optimizer now."""
        return self._look(module).owner is not None

    def _holds(self, verdict: Verdict) -> bool:
        if verdict.owner is None:
            verdict.left -= 1
            return verdict.left > 0
        owner = verdict.owner()
        return owner is not None and id(getattr(owner, verdict.name, None)) in self._ids

    def _look(self, module: nn.Module) -> Verdict:
        optimizer = self.optimizer()
        groups = [] if optimizer is None else optimizer.param_groups
        self._ids = {id(parameter) for group in groups for parameter in group["params"]}
        self.compiled = self.compiled or any(map(_is_compiled, _walk(module)))
        owner, name = self._first_owned(module)
        key, verdicts = id(module), self._verdicts
        verdict = Verdict(weakref.ref(module, lambda _: verdicts.pop(key, None)), owner, name, self.compiled)
        verdicts[key] = verdict
        return verdict

    def _first_owned(self, module: nn.Module) -> tuple[nn.Module | None, str]:
        for owner in _walk(module):
            for name, parameter in owner.named_parameters(recurse=False):
                if id(parameter) in self._ids:
                    return owner, name
        return None, ""


def _walk(root: nn.Module) -> Iterator[nn.Module]:
    # Module.modules() needs a hash; a model without one can be run all the same, and must still run with this hook.
    seen, waiting = set(), [root]
    while waiting:
        module = waiting.pop()
        if id(module) not in seen:
            seen.add(id(module))
            yield module
            waiting.extend(child for child in module._modules.values() if child is not None)


def _is_compiled(module: nn.Module) -> bool:
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None


_bindings: list[Binding] = []
_lock = threading.RLock()  # re-entrant: the garbage collector may run `unwatch` at any point


def watch(binding: Binding) -> None:
    """Lets module forwards start this binding. One process-wide hook serves all of them."""
    with _lock:
        _bindings.append(binding)
        _place_hook()


def unwatch(binding: Binding) -> None:
    """The end of `watch`; with the last binding the process-wide hook goes too."""
    with _lock:
        if binding in _bindings:
            _bindings.remove(binding)
        _place_hook()
    binding.end()


def _place_hook() -> None:
    # A process-wide hook costs each module call 2 us, so it is there only while some optimizer waits for a forward.
    waiting = any(binding.waits for binding in _bindings)
    if waiting and not _hook.is_on:
        _hook.put_on()
    elif not waiting and _hook.is_on:
        _hook.take_off()


def _before_forward(module: nn.Module, args: Any) -> None:
    # Before any module's forward, so the cheap refusals come first. torch.compile traces it and folds is_compiling.
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or not config.enabled:
        return
    for binding in tuple(_bindings):
        amp = binding.amp
        casts = amp is not None and not amp.inside
        if (casts or not binding.recording) and (verdict := binding.starts_at(module)) is not None and may_begin():
            if not binding.recording and not verdict.compiled and not foreign_modes():
                binding.open()
                binding.local.root = weakref.ref(module)
            if casts and amp is not None:
                _begin_amp(amp, module, verdict)
        if binding.batch is not None and binding.recording and binding.local.root() is module:
            binding.batch(args)


_hook = GlobalHook(_global_forward_pre_hooks, _before_forward)


def _begin_amp(amp: HalfForward, module: nn.Module, verdict: Verdict) -> None:
    owner = verdict.owner() if verdict.owner is not None else None
    assert owner is not None
    amp.begin(module, getattr(owner, verdict.name).device, _place_hook_again)
    with _lock:
        _place_hook()


def _place_hook_again() -> None:
    with _lock:
        _place_hook()


def may_begin() -> bool:
    """Is this a training forward? Forwards also happen for other reasons."""
    # A checkpoint recomputes its forward inside backward, on CUDA in a thread of the autograd engine, which
    # would keep the recording for good.
    if torch._C._current_graph_task_id() != -1 or torch._C._get_tracing_state() is not None:
        return False
    return torch._C._functorch.peek_interpreter_stack() is None
