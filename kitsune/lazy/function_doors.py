"""Functions of torch's whose C++ reads numbers, asks for addresses, or asks whether a mode is on, before any dispatcher: what
they get instead."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.autograd.graph import increment_version
from torch.overrides import _get_current_function_mode_stack, _pop_mode_temporarily
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from kitsune.ir import Barrier
from kitsune.lazy.by_doors import ByDoors
from kitsune.lazy.call_lane import CallLane
from kitsune.lazy.early_reads import memory_changed
from kitsune.lazy.rebuild import replace_tensors, tensors_in
from kitsune.lazy.recorder import Recorder
from kitsune.lazy.recorders import listening, of_this_thread
from kitsune.lazy.recording import PLAIN
from kitsune.lazy.tensor import LazyTensor, as_plain

_INTEGERS = (torch.int64, torch.int32, torch.uint8)


def not_compiled(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Doors that compilers do not see: what they trace is the original."""

    def make_both(original: Any) -> Any:
        opened = make(original)

        @functools.wraps(original)
        def door(*args: Any, **kwargs: Any) -> Any:
            return original(*args, **kwargs) if torch.compiler.is_compiling() else opened(*args, **kwargs)

        return door

    return make_both


@not_compiled
def places_door(original: Any) -> Any:
    """The integers behind what it is to split say where."""

    def door(*args: Any, **kwargs: Any) -> Any:
        named = {name: kwargs.pop(name) for name in ("input", "self") if name in kwargs}
        places, kwargs = _with_numbers(args[1:], kwargs)
        return original(*args[:1], *places, **named, **kwargs)

    return door


@not_compiled
def lengths_door(original: Any) -> Any:
    """On a CPU, the mean of torch.ctc_loss makes a tensor of a list of lengths, and fills its memory from C++.

    Elsewhere torch reads a tensor of lengths, but not where a dispatch mode is on: then it asks for it on the device.
    """

    def door(log_probs: Any, targets: Any, input_lengths: Any, target_lengths: Any, *args: Any, **kwargs: Any) -> Any:
        given = (input_lengths, target_lengths)
        mean = (args[1] if len(args) > 1 else kwargs.get("reduction", 1)) == 1
        if mean and log_probs.device.type == "cpu" and all(isinstance(lengths, (list, tuple)) for lengths in given):
            input_lengths, target_lengths = (torch.tensor(lengths, dtype=torch.int64) for lengths in given)
        elif log_probs.device.type != "cpu" and all(isinstance(t, torch.Tensor) for t in given) and listening():
            input_lengths, target_lengths = (lengths.tolist() for lengths in given)
        return original(log_probs, targets, input_lengths, target_lengths, *args, **kwargs)

    return door


@not_compiled
def recurrent_door(original: Any) -> Any:
    """C++ has the dispatcher make a tensor over all weights for cuDNN, under autocast one that they are cast into, and asks for
    places in its memory: as in `disable()`. Recorded, they were packed at each call, or written where there was no memory."""

    def door(*args: Any, **kwargs: Any) -> Any:
        on_cuda = any(t.device.type == "cuda" for t in tensors_in((args, kwargs)))
        with _unrecorded("cuda") if on_cuda else contextlib.nullcontext():
            args, kwargs = _with_numbers(args, kwargs)
            return original(*args, **kwargs)

    return door


@not_compiled
def host_door(original: Any) -> Any:
    """C++ has the dispatcher make tensors on the host, and fills or reads their memory: as in `disable()`."""

    def door(*args: Any, **kwargs: Any) -> Any:
        with _unrecorded("cpu"):
            args, kwargs = _with_numbers(args, kwargs)
            return original(*args, **kwargs)

    return door


def eager_door(suits: Callable[..., bool] = lambda *args, **kwargs: True) -> Callable[[Any], Any]:
    """While a dispatch mode is on, or for a wrapper, C++ leaves out what asks for numbers, or computes as if a gradient were
    wanted. A call that `suits` and of which none is wanted is made on plain tensors, with no mode on."""

    def make(original: Any) -> Any:
        def door(*args: Any, **kwargs: Any) -> Any:
            tensors = tensors_in((args, kwargs))
            graded = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
            if graded or not _may_hide(tensors) or not suits(*args, **kwargs):
                return original(*args, **kwargs)
            args, kwargs = _computed(tensors, args, kwargs)
            with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
                return original(*args, **kwargs)

        return door

    return not_compiled(make)


@not_compiled
def classes_door(original: Any) -> Any:
    """On a CPU torch looks at each class, and elsewhere its scatter does. Of a wrapper it compares them with all classes instead,
    and one that is none of them gets a row of zeros."""
    opened = eager_door(on_host)(original)

    def door(input: Any, num_classes: int = -1) -> Any:
        if type(input) is not LazyTensor or on_host(input) or input.dtype is not torch.int64 or num_classes < 1:
            return opened(input, num_classes)
        row = torch.zeros((*input.shape, num_classes), dtype=torch.int64, device=input.device)
        return row.scatter_(-1, input.unsqueeze(-1), 1) if input.numel() else row

    return door


@not_compiled
def product_door(original: Any) -> Any:
    """Of batches of matrices, C++ views `out` as a matrix, and copies from the view unless it shares out's storage, for which it
    compares addresses: wrappers have none. Such a call is made on plain tensors, with no mode on."""

    def door(*args: Any, out: Any = None, **kwargs: Any) -> Any:
        tensors = tensors_in((args, kwargs, out))
        graded = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        if out is None or graded or not _may_hide(tensors):
            return original(*args, **kwargs) if out is None else original(*args, out=out, **kwargs)
        args, (kwargs, plain) = _computed(tensors, args, (kwargs, out))
        memory_changed()
        try:
            with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
                original(*args, out=plain, **kwargs)
                if plain is not out:
                    increment_version([out])
        finally:
            # It may have another size now, also where it was refused after all.
            for recorder in listening():
                recorder.known.forget()
            if plain is not out:
                out.cell.region.recorder.stand_for(out, plain)
        return out

    return door


@not_compiled
def elements_door(original: Any) -> Any:
    """Python goes from element to element of its memory, and nobody hears of what is written."""

    def door(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = tensors_in((tensor, args, kwargs))
        if not _may_hide(tensors):
            return original(tensor, *args, **kwargs)
        (plain, *args), kwargs = _computed(tensors, (tensor, *args), kwargs)
        memory_changed()
        original(plain, *args, **kwargs)
        return tensor

    return door


@not_compiled
def range_door(original: Any) -> Any:
    """On a CPU torch looks at each probability, but not while a dispatch mode is on."""

    def door(input: Any, q: Any, *args: Any, **kwargs: Any) -> Any:
        fits = isinstance(q, torch.Tensor) and q.dtype is input.dtype and q.dim() < 2
        if fits and on_host(input) and on_host(q) and _may_hide([input, q]):
            (plain,), _ = _computed([q], (q,), {})
            with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction(), torch.no_grad():
                # Of one number: either it raises, or nothing comes of it.
                original(torch.zeros(1, dtype=q.dtype), plain)
        return original(input, q, *args, **kwargs)

    return door


@not_compiled
def unheard_door(original: Any) -> Any:
    """In evaluation, torch's transformers leave out their own kernels, and with them the zeros for what is padded, where anybody
    listens to calls: the call lane is not to."""

    def door(module: Any, *args: Any, **kwargs: Any) -> Any:
        lanes = _get_current_function_mode_stack()
        if module.training or not lanes or not all(isinstance(mode, (CallLane, ByDoors)) for mode in lanes):
            return original(module, *args, **kwargs)
        tensors = [*tensors_in((args, kwargs)), *module.parameters()]
        if not _are_known(tensors) or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
            return original(module, *args, **kwargs)
        with contextlib.ExitStack() as unheard:
            for _ in lanes:
                unheard.enter_context(_pop_mode_temporarily())
            return original(module, *args, **kwargs)

    return door


def operator_door(make: Callable[[Any], Any], operator: Any) -> Any:
    """The door of an operator that is called by its name: its first argument may come as `self`."""
    opened = make(operator)

    def door(*args: Any, **kwargs: Any) -> Any:
        first = () if args or "self" not in kwargs else (kwargs.pop("self"),)
        return opened(*first, *args, **kwargs)

    return door


def on_host(input: Any, *args: Any, **kwargs: Any) -> bool:
    """Is the first argument there, where torch looks at its numbers? On a GPU its kernel does."""
    return bool(input.device.type == "cpu")


def takes_singular_values(input: Any, ord: Any = None, dim: Any = None, *args: Any, **kwargs: Any) -> bool:
    """Is this norm made of singular values?"""
    is_matrix = input.dim() == 2 if dim is None else not isinstance(dim, int) and len(dim) == 2
    return is_matrix and ord in (2, -2, "nuc")


def _with_numbers(args: Any, kwargs: Any) -> Any:
    """The arguments with the integers on the host computed, and with memory."""
    integers = [t for t in tensors_in((args, kwargs)) if t.dtype in _INTEGERS and on_host(t)]
    return _computed(integers, args, kwargs) if integers and not _is_transformed() else (args, kwargs)


def _computed(tensors: list[Any], args: Any, kwargs: Any) -> Any:
    """The arguments with these tensors computed, and with memory."""
    for recorder in listening():
        # Nobody is to follow a call around this one.
        recorder.n_unrecorded += 1
        for tensor in tensors:
            recorder.before_door(tensor, Barrier.DOOR)
    by_id = {id(t): as_plain(t) for t in tensors if type(t) is LazyTensor}
    return replace_tensors((args, kwargs), by_id) if by_id else (args, kwargs)


@contextlib.contextmanager
def _unrecorded(device: str) -> Iterator[None]:
    """This thread's recorders for such a device let everything pass."""
    with contextlib.ExitStack() as paused:
        for recorder in of_this_thread():
            if recorder.device.type == device:
                recorder.flush(Barrier.DOOR)
                recorder.pause()
                paused.callback(recorder.resume)
        yield


def _may_hide(tensors: list[Any]) -> bool:
    """Are the modes that are on all ours, and is this of no other library or transform?"""
    ours = all(isinstance(mode, Recorder) for mode in _get_current_dispatch_mode_stack())
    return ours and _are_known(tensors) and not _is_transformed()


def _is_transformed() -> bool:
    """Are we inside of a transform of torch.func, whose tensors have no memory?"""
    return torch._C._functorch.maybe_current_level() is not None


def _are_known(tensors: Any) -> bool:
    return all(type(t) in PLAIN or type(t) is LazyTensor for t in tensors if isinstance(t, torch.Tensor))
