"""What a door does: each function makes the replacement of one kind of door from the original."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from kitsune.ir import Barrier, streams
from kitsune.lazy.aliases import alias_of
from kitsune.lazy.casts import lets_out, will_write, written
from kitsune.lazy.cell import share
from kitsune.lazy.rebuild import replace_tensors, tensors_in
from kitsune.lazy.recorders import EVERY, listening
from kitsune.lazy.recording import PLAIN
from kitsune.lazy.settle import settle_grads
from kitsune.lazy.stream_changes import called_here
from kitsune.lazy.tensor import LazyTensor, as_plain


def plain(argument: Any) -> Any:
    return as_plain(argument) if type(argument) is LazyTensor else argument


def plain_arguments(original: Any) -> Any:
    @functools.wraps(original)
    def door(*args: Any, **kwargs: Any) -> Any:
        return original(*map(plain, args), **{name: plain(a) for name, a in kwargs.items()})

    return door


def kernel_door(original: Any) -> Any:
    """A launch that takes its tensors in a tuple, and not through the dispatcher."""

    @functools.wraps(original)
    def door(*args: Any, **kwargs: Any) -> Any:
        tensors = tensors_in((args, kwargs))
        for recorder in listening():
            for tensor in tensors:
                recorder.before_door(tensor, Barrier.DOOR)
        plain = {id(t): as_plain(t) for t in tensors if type(t) is LazyTensor}
        args, kwargs = replace_tensors((args, kwargs), plain)
        with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
            return original(*args, **kwargs)

    return door


class Plain(torch.autograd.Function):
    """The plain tensor of a wrapper, with its history."""

    @staticmethod
    def forward(ctx: Any, wrapper: LazyTensor) -> torch.Tensor:
        return alias_of(wrapper)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return grad


def subclass_door(original: Any) -> Any:
    """C++ makes an alias and then a subclass of it: with a mode on, or for a wrapper, that alias has a Python object already."""

    @functools.wraps(original)
    def door(tensor: Any, cls: Any) -> Any:
        if type(tensor) is LazyTensor:
            tensor = Plain.apply(tensor) if tensor.requires_grad else alias_of(tensor)
        with torch._C._DisableTorchDispatch():
            return original(tensor, cls)

    return door


def make_subclass_door(original: Any) -> Any:
    """As `as_subclass`, for parameters that are yet without a shape."""

    @functools.wraps(original)
    def door(cls: Any, data: Any, *args: Any, **kwargs: Any) -> Any:
        if type(data) is not LazyTensor and not listening():
            return original(cls, data, *args, **kwargs)
        data = alias_of(data) if type(data) is LazyTensor else data
        with torch._C._DisableTorchDispatch():
            return original(cls, data, *args, **kwargs)

    return staticmethod(door)


# They tell of memory what nobody could change by it.
_TELLS = ("data_ptr", "const_data_ptr", "tolist", "is_shared", "is_pinned", "pin_memory", "__dlpack_device__", "__repr__")


def memory_door(original: Any) -> Any:
    tells = getattr(original, "__name__", "") in _TELLS

    @functools.wraps(original)
    def door(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        if type(tensor) is LazyTensor:
            tensor = as_plain(tensor)
        elif isinstance(tensor, torch.Tensor):
            for recorder in listening():
                recorder.before_door(tensor, Barrier.DOOR)
                if not tells:
                    recorder.known.forget()
                    lets_out(recorder, tensor)
        if type(tensor) not in PLAIN:
            return original(tensor, *args, **kwargs)
        # Some doors dispatch ops on the way (numpy() detaches): with the mode on they would get a wrapper, and no memory.
        with torch._C._DisableTorchDispatch():
            return original(tensor, *args, **kwargs)

    return door


def dlpack_door(original: Any) -> Any:
    opened = memory_door(original)

    @functools.wraps(original)
    def door(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        if type(tensor) is LazyTensor:
            tensor = as_plain(tensor)
        if isinstance(tensor, torch.Tensor):
            share(tensor)
        return opened(tensor, *args, **kwargs)

    return door


def deepcopy_door(original: Any) -> Any:
    @functools.wraps(original)
    def door(tensor: Any, memo: Any) -> Any:
        if type(tensor) is not torch.Tensor:
            return original(tensor, memo)
        for recorder in listening():
            recorder.before_door(tensor, Barrier.DOOR)
        # torch fills an empty tensor by set_(): with the mode on, that tensor would be a wrapper.
        with torch._C._DisableTorchDispatch():
            return original(tensor, memo)

    return door


def property_door(original: Any) -> Any:
    return property(memory_door(lambda tensor: original.__get__(tensor)))


def data_door(original: Any) -> Any:
    def set_data(tensor: torch.Tensor, value: Any) -> None:
        for recorder in listening():
            recorder.before_door(tensor, Barrier.DOOR)
            recorder.known.forget()
            if recorder.lane is not None:
                will_write(recorder.lane)
                written(recorder.lane)
        original.__set__(tensor, plain(value))

    return property(lambda tensor: original.__get__(tensor), set_data, lambda tensor: original.__delete__(tensor))


def parameter_door(original: Any) -> Any:
    new = original.__func__ if isinstance(original, staticmethod) else original

    @functools.wraps(new)
    def door(cls: Any, data: Any = None, *args: Any, **kwargs: Any) -> Any:
        if type(data) is LazyTensor:
            # A Parameter outlives the region, and optimizers and modules look at its type.
            data.cell.region.recorder.flush(Barrier.PARAMETER)
            data = alias_of(data)
        return new(cls, data, *args, **kwargs)

    return staticmethod(door)


def random_door(original: Any) -> Any:
    plain_original = plain_arguments(original)

    @functools.wraps(original)
    def door(*args: Any, **kwargs: Any) -> Any:
        for recorder in listening():
            recorder.before_random()
        return plain_original(*args, **kwargs)

    return door


def thread_door(original: Any) -> Any:
    flushed = flush_door(Barrier.THREAD)(original)

    @functools.wraps(original)
    def door(*args: Any, **kwargs: Any) -> Any:
        for recorder in listening():
            recorder.shared = True
        return flushed(*args, **kwargs)

    return door


def generator_door(original: Any) -> Any:
    plain_original = random_door(original)

    @functools.wraps(original)
    def door(*args: Any, **kwargs: Any) -> Any:
        # Some make tensors from C++, which must not become wrappers.
        with torch._C._DisableTorchDispatch():
            return plain_original(*args, **kwargs)

    return door


def reducer_door(original: Any) -> Any:
    """C++ that makes buckets of gradients, and tells the ranks of them: tensors of its own, which must not become wrappers."""

    @functools.wraps(original)
    def door(*args: Any, **kwargs: Any) -> Any:
        for recorder in listening():
            recorder.flush(Barrier.DOOR)
        with torch._C._DisableTorchDispatch():
            return original(*args, **kwargs)

    return door


def history_door(original: Any) -> Any:
    """C++ that goes through the graph behind a tensor: calls that are only matched so far have made none."""

    @functools.wraps(original)
    def door(*args: Any, **kwargs: Any) -> Any:
        for tensor in tensors_in((args, kwargs)):
            _ = tensor.grad_fn  # whoever asks for it has the graph made
        return original(*args, **kwargs)

    return door


def default_door(original: Any) -> Any:
    flushed = flush_door(Barrier.DEFAULTS)(original)

    @functools.wraps(original)
    def door(*args: Any, **kwargs: Any) -> Any:
        try:
            return flushed(*args, **kwargs)
        finally:
            # The next region begins under the new default.
            for recorder in listening():
                recorder.restart()

    return door


def swap_door(original: Any) -> Any:
    """torch.utils.swap_tensors refuses tensors with weak references, and a region knows its inputs by their identity."""

    @functools.wraps(original)
    def door(first: Any, second: Any) -> Any:
        for recorder in listening():
            recorder.flush(Barrier.DOOR)
            settle_grads(recorder.take_leaves())
        for recorder in EVERY:
            recorder.known.forget()
        return original(first, plain(second) if type(first) is not LazyTensor else second)

    return door


def flush_door(cause: Barrier) -> Callable[[Any], Any]:
    def make(original: Any) -> Any:
        @functools.wraps(original)
        def door(*args: Any, **kwargs: Any) -> Any:
            for recorder in listening():
                recorder.flush(cause)
            return original(*args, **kwargs)

        return door

    return make


def stream_door(original: Any) -> Any:
    """Another stream becomes the current one, of which the owners of memory that is moved are to know."""
    flushed = flush_door(Barrier.SYNCHRONIZE)(original)

    @functools.wraps(original)
    def door(*args: Any, **kwargs: Any) -> Any:
        _use_streams()
        try:
            return flushed(*args, **kwargs)
        finally:
            _use_streams()
            for recorder in listening():
                called_here(recorder)

    return door


def _use_streams() -> None:
    if torch.cuda.is_initialized():
        streams.use(torch.cuda.current_stream())
