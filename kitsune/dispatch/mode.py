"""The TorchDispatchMode that hands every aten call to a recorder."""

import contextlib
from collections.abc import Iterator
from types import CodeType
from typing import Any

import torch
from torch._C import DispatchKey, DispatchKeySet
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack, _pop_mode, _push_mode

from kitsune.ir import Barrier, plain_times

_n_modes, _mode_at = torch._C._len_torch_dispatch_stack, torch._C._get_dispatch_stack_at


class RecordMode(TorchDispatchMode):
    """Sees each op below autograd. What becomes of an op is its subclass's `__torch_dispatch__`, which the pipeline gives it."""

    # cond, flex_attention and their like come too, to be passed through.
    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # The default wraps each call in a dynamo guard: 0.7 to 1.4 s of imports at first entry and 0.5 us per op.
        return False

    def enter(self) -> None:
        """Put this mode on top of the calling thread's stack."""
        if self not in _get_current_dispatch_mode_stack():
            _push_mode(self)

    def is_on_top(self) -> bool:
        """Would the next op come here? Then this mode can be taken off and put back in its place."""
        # The list of them all would take 1.1 us more (CPU host).
        n = _n_modes()
        return n > 0 and _mode_at(n - 1) is self

    @contextlib.contextmanager
    def above_autograd(self) -> Iterator[None]:
        """A context for calls that autograd and this mode are to see, also where an op is handled or somebody hides modes."""
        hidden = self not in _get_current_dispatch_mode_stack()
        include, exclude = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
        # In inference mode there is no autograd, only who counts writes and makes views. Autocast stays as it is: it is off where
        # its key is excluded.
        above = _VIEWS if torch.is_inference_mode_enabled() else _AUTOGRAD
        with torch._C._ForceDispatchKeyGuard(include, exclude - above - _BITS):
            if hidden:
                self.enter()
            try:
                yield
            finally:
                if hidden:
                    self.leave()

    def with_bits(self) -> Any:
        """A context for functions of others, called while an op is handled, which make conjugate views and the like."""
        include, exclude = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
        return torch._C._ForceDispatchKeyGuard(include, exclude - _BITS)

    def leave(self) -> bool:
        """Take this mode off the stack wherever it is: a user's own mode may have been entered after it and be open still.

        False if it is not there. While an op is being handled the mode is off the stack and torch puts it back afterwards; a
        garbage collection at that moment may close a context.
        """
        if self not in _get_current_dispatch_mode_stack():
            return False
        above = []
        try:
            while (mode := _pop_mode()) is not self:
                above.append(mode)
        finally:
            for mode in reversed(above):
                _push_mode(mode)
        return True


def keep_out_of_dynamo(code: CodeType) -> None:
    """Let torch.compile neither trace a function of ours nor what it calls, when compiled code runs with the mode on."""
    frames = torch._C._dynamo.eval_frame
    skip = frames._FrameAction.SKIP
    frames.set_code_exec_strategy(code, frames._FrameExecStrategy(skip, skip))


def foreign_modes() -> list[TorchDispatchMode]:
    """Dispatch modes of others that are open in this thread."""
    return [mode for mode in _get_current_dispatch_mode_stack() if not isinstance(mode, RecordMode)]


def kept_out_by() -> tuple[Barrier, str] | None:
    """Why a context that is entered now is to record nothing, if it is not: the barrier, and whose it is."""
    if modes := foreign_modes():
        return Barrier.FOREIGN_MODE, type(modes[-1]).__name__
    return (Barrier.CAPTURE, "accelerate()") if plain_times.is_plain() else None


# An op is recorded below autograd and autocast. Running it later must not meet them again: no second version bump, no cast
# by an autocast that was not on when it was recorded.
_ABOVE = DispatchKeySet(DispatchKey.Python)
for _name in ("PythonTLSSnapshot", "ADInplaceOrView"):
    _ABOVE = _ABOVE | DispatchKeySet(getattr(DispatchKey, _name))
_VIEWS = _ABOVE
for _name in ("AutogradOther", "AutogradCPU", "AutogradCUDA", "AutogradMeta"):
    _ABOVE = _ABOVE | DispatchKeySet(getattr(DispatchKey, _name))
_AUTOGRAD = _ABOVE
_AUTOCAST = DispatchKeySet(DispatchKey.AutocastCPU) | DispatchKeySet(DispatchKey.AutocastCUDA)
_ABOVE = _ABOVE | _AUTOCAST
# Torch excludes these while a mode handles an op, and a kernel that makes conjugate views of its own, as that of linalg.pinv
# does, then computes with the conjugates of what it means.
_BITS = DispatchKeySet(DispatchKey.Conjugate) | DispatchKeySet(DispatchKey.Negative) | DispatchKeySet(DispatchKey.ZeroTensor)
_COUNTS = DispatchKeySet(DispatchKey.ADInplaceOrView)


# By what is excluded around it: to make a set of keys takes 0.2 us (CPU host).
_beneath: dict[tuple[bool, bool, int], DispatchKeySet] = {}


def below_autograd(casts: bool = False, counts: bool = False) -> Any:
    """A context in which aten calls on plain tensors go straight to their kernels, as they do in eager; with `casts`, autocast is
    on inside of them, and with `counts` the writes are counted."""
    include, exclude = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    key = casts, counts, exclude.raw_repr()
    beneath = _beneath.get(key)
    if beneath is None:
        seen = _BITS | (_AUTOCAST if casts else _BITS) | (_COUNTS if counts else _BITS)
        beneath = _beneath[key] = (exclude | _ABOVE) - seen
    guard = torch._C._ForceDispatchKeyGuard(include, beneath)
    return _outside_inference(guard) if torch.is_inference_mode_enabled() else guard


@contextlib.contextmanager
def _outside_inference(guard: Any) -> Iterator[None]:
    # What was recorded before inference mode was entered may be run inside of it, and must not become inference tensors. To leave
    # the mode switches gradients on, by which some kernels choose how they compute (LSTM's on a CPU).
    graded = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(graded), guard:
        yield
