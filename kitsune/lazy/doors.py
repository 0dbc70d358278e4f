"""The doors: ways to a tensor's memory, or around the order of ops, that never reach the dispatcher.

One table. The doors are patched while any context is open and put back when the last one closes; wrappers carry their own
overrides (`tensor.py`), which stay for life.
"""

import ctypes
import functools
import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils._python_dispatch as python_dispatch

from kitsune.ir import Barrier
from kitsune.lazy.rebuild import replace_tensors, tensors_in
from kitsune.lazy.recorder import Recorder
from kitsune.lazy.recording import PLAIN
from kitsune.lazy.tensor import METHOD_DOORS, LazyTensor, as_plain

# (owner, name, what makes the door from the original) and (owner, name, was it the owner's own, the original)
Door = tuple[Any, str, Callable[[Any], Any]]
Original = tuple[Any, str, bool, Any]

_open: list[Recorder] = []
_originals: list[Original] = []
_lasting: list[Original] = []
_lock = threading.Lock()


def open_doors(recorder: Recorder) -> None:
    """Watch the doors for a recorder."""
    with _lock:
        _open.append(recorder)
        if not _lasting:
            _lasting.extend(_put(door) for door in _lasting_doors())
        if len(_open) == 1:
            _originals.extend(_put(door) for door in _doors())


def close_doors(recorder: Recorder) -> None:
    """Stop watching for a recorder."""
    with _lock:
        _open.remove(recorder)
        if not _open:
            while _originals:
                owner, name, own, original = _originals.pop()
                if own:
                    _set(owner, name, original)
                else:
                    delattr(owner, name)


def _set(owner: Any, name: str, value: Any) -> None:
    try:
        setattr(owner, name, value)
    except TypeError:
        # torch.Generator is a static type: Python does not assign to it, but finds methods in this dictionary.
        gc.get_referents(vars(owner))[0][name] = value
        ctypes.pythonapi.PyType_Modified(ctypes.py_object(owner))


def _put(door: Door) -> Original:
    owner, name, make = door
    own = name in vars(owner)
    original = vars(owner)[name] if own else getattr(owner, name)
    _set(owner, name, make(original))
    return owner, name, own, original


def _lasting_doors() -> Iterator[Door]:
    """Doors that only a wrapper needs. Wrappers outlive their context, so these stay from the first context on."""
    for owner, name in ((torch._C, "_to_dlpack"), (torch.utils.dlpack, "to_dlpack"), (torch, "to_dlpack")):
        if hasattr(owner, name):
            yield owner, name, _memory_door
    if hasattr(torch._C, "_cuda_jiterator_compile_and_launch_kernel"):
        yield torch._C, "_cuda_jiterator_compile_and_launch_kernel", _kernel_door
    yield torch.Tensor, "as_subclass", _subclass_door
    for name in ("tensor", "as_tensor", "asarray"):
        yield torch, name, _plain_items
    yield torch.Tensor, "new_tensor", _plain_items


def _doors() -> Iterator[Door]:
    for name in METHOD_DOORS:
        yield torch.Tensor, name, _memory_door
    yield torch.Tensor, "__repr__", _memory_door
    yield torch.Tensor, "__deepcopy__", _deepcopy_door
    yield torch.Tensor, "data", _data_door
    yield torch.Tensor, "__cuda_array_interface__", _property_door
    yield python_dispatch, "_disable_current_modes", _flush_door(Barrier.MODES_OFF)
    yield torch.nn.Parameter, "__new__", _parameter_door
    for table, make in (
        (_RANDOM, _random_door),
        (_SYNCHRONIZE, _flush_door(Barrier.SYNCHRONIZE)),
        (_DEFAULTS, _flush_door(Barrier.DEFAULTS)),
    ):
        for owner, names in table:
            yield from ((owner, name, make) for name in names.split() if hasattr(owner, name))


_SEEDS = "manual_seed seed get_rng_state set_rng_state"
_CUDA_SEEDS = f"{_SEEDS} manual_seed_all seed_all get_rng_state_all set_rng_state_all"
Table = tuple[tuple[Any, str], ...]
_GENERATOR = "manual_seed seed get_state set_state graphsafe_get_state graphsafe_set_state get_offset set_offset"
_RANDOM: Table = (
    (torch.Generator, _GENERATOR),
    (torch, _SEEDS),
    (torch.random, _SEEDS),
    (torch.cuda, _CUDA_SEEDS),
    (torch.cuda.random, _CUDA_SEEDS),
)
# What kernels read when they run, and results' dtypes depend on: an op must run under the settings that it was called under.
_DEFAULTS: Table = (
    (torch, "set_default_dtype set_num_threads set_flush_denormal"),
    (
        torch._C,
        "_set_deterministic_algorithms _set_deterministic_fill_uninitialized_memory _set_cublas_allow_tf32 _set_cudnn_allow_tf32 "
        "_set_cublas_allow_fp16_reduced_precision_reduction _set_cublas_allow_bf16_reduced_precision_reduction "
        "_set_cudnn_benchmark _set_cudnn_deterministic _set_cudnn_enabled _set_float32_matmul_precision _set_mkldnn_enabled "
        "_set_mkldnn_deterministic _set_fp32_precision_setter _set_sdp_use_flash _set_sdp_use_mem_efficient _set_sdp_use_math "
        "_set_sdp_use_cudnn _set_sdp_priority_order",
    ),
)
_SYNCHRONIZE: Table = (
    (torch.cuda, "synchronize set_stream set_device"),
    (torch.cuda.Event, "record wait query elapsed_time synchronize"),
    (torch.cuda.Stream, "wait_event wait_stream record_event query synchronize"),
    (torch.cuda.StreamContext, "__enter__ __exit__"),
    (torch.accelerator, "synchronize set_stream"),
)


def _plain(argument: Any) -> Any:
    return as_plain(argument) if type(argument) is LazyTensor else argument


def _plain_arguments(original: Any) -> Any:
    @functools.wraps(original)
    def door(*args: Any, **kwargs: Any) -> Any:
        return original(*map(_plain, args), **{name: _plain(a) for name, a in kwargs.items()})

    return door


def _plain_items(original: Any) -> Any:
    """torch.tensor([a, b]) reads the tensors of a list from C++."""

    @functools.wraps(original)
    def door(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(a, (list, tuple)) for a in args) or isinstance(kwargs.get("data"), (list, tuple)):
            wrappers = [t for t in tensors_in((args, kwargs)) if type(t) is LazyTensor and t is not args[0]]
            args, kwargs = replace_tensors((args, kwargs), {id(t): as_plain(t) for t in wrappers})
        return original(*args, **kwargs)

    return door


def _kernel_door(original: Any) -> Any:
    """A launch that takes its tensors in a tuple, and not through the dispatcher."""

    @functools.wraps(original)
    def door(*args: Any, **kwargs: Any) -> Any:
        tensors = tensors_in((args, kwargs))
        for recorder in _open:
            for tensor in tensors:
                recorder.before_door(tensor, Barrier.DOOR)
        plain = {id(t): as_plain(t) for t in tensors if type(t) is LazyTensor}
        args, kwargs = replace_tensors((args, kwargs), plain)
        with torch._C._DisableTorchDispatch():
            return original(*args, **kwargs)

    return door


class _Plain(torch.autograd.Function):
    """The plain tensor of a wrapper, with its history."""

    @staticmethod
    def forward(ctx: Any, wrapper: LazyTensor) -> torch.Tensor:
        return as_plain(wrapper, requires_grad=False)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return grad


def _subclass_door(original: Any) -> Any:
    """C++ makes an alias and then a subclass of it: with a mode on, or for a wrapper, that alias has a Python object already."""

    @functools.wraps(original)
    def door(tensor: Any, cls: Any) -> Any:
        if type(tensor) is LazyTensor:
            tensor = _Plain.apply(tensor) if tensor.requires_grad else as_plain(tensor)
        with torch._C._DisableTorchDispatch():
            return original(tensor, cls)

    return door


def _memory_door(original: Any) -> Any:
    @functools.wraps(original)
    def door(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        if type(tensor) is LazyTensor:
            tensor = as_plain(tensor)
        elif isinstance(tensor, torch.Tensor):
            for recorder in _open:
                recorder.before_door(tensor, Barrier.DOOR)
        if type(tensor) not in PLAIN:
            return original(tensor, *args, **kwargs)
        # Some doors dispatch ops on the way (numpy() detaches): with the mode on they would get a wrapper, and no memory.
        with torch._C._DisableTorchDispatch():
            return original(tensor, *args, **kwargs)

    return door


def _deepcopy_door(original: Any) -> Any:
    @functools.wraps(original)
    def door(tensor: Any, memo: Any) -> Any:
        if type(tensor) is not torch.Tensor:
            return original(tensor, memo)
        for recorder in _open:
            recorder.before_door(tensor, Barrier.DOOR)
        # torch fills an empty tensor by set_(): with the mode on, that tensor would be a wrapper.
        with torch._C._DisableTorchDispatch():
            return original(tensor, memo)

    return door


def _property_door(original: Any) -> Any:
    return property(_memory_door(lambda tensor: original.__get__(tensor)))


def _data_door(original: Any) -> Any:
    def set_data(tensor: torch.Tensor, value: Any) -> None:
        for recorder in _open:
            recorder.before_door(tensor, Barrier.DOOR)
        original.__set__(tensor, _plain(value))

    return property(lambda tensor: original.__get__(tensor), set_data)


def _parameter_door(original: Any) -> Any:
    new = original.__func__ if isinstance(original, staticmethod) else original

    @functools.wraps(new)
    def door(cls: Any, data: Any = None, *args: Any, **kwargs: Any) -> Any:
        if type(data) is LazyTensor:
            # A Parameter outlives the region, and optimizers and modules look at its type.
            data.cell.region.recorder.flush(Barrier.PARAMETER)
            data = as_plain(data, requires_grad=False)
        return new(cls, data, *args, **kwargs)

    return staticmethod(door)


def _random_door(original: Any) -> Any:
    plain_original = _plain_arguments(original)

    @functools.wraps(original)
    def door(*args: Any, **kwargs: Any) -> Any:
        for recorder in _open:
            recorder.before_random()
        return plain_original(*args, **kwargs)

    return door


def _flush_door(cause: Barrier) -> Callable[[Any], Any]:
    def make(original: Any) -> Any:
        @functools.wraps(original)
        def door(*args: Any, **kwargs: Any) -> Any:
            for recorder in _open:
                recorder.flush(cause)
            return original(*args, **kwargs)

        return door

    return make
