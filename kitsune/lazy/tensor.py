"""LazyTensor: a tensor with a shape, a dtype, an autograd history and no memory. Every Python way to its memory flushes."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import _tensor_str

from kitsune.ir import Barrier, TensorType, own
from kitsune.lazy.cell import Cell, share
from kitsune.lazy.words import in_eagers_words


class LazyTensor(torch.Tensor):
    """Stands for a value that is recorded, and keeps standing for it once it is computed.

    To user code it is a torch.Tensor. C++ code that asks for its memory without going through the dispatcher gets an error
    from torch, since there is none.
    """

    __slots__ = ("cell",)
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    cell: Cell

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        recorder = next(a for a in _lazy_tensors((args, kwargs))).cell.region.recorder
        return recorder.run_outside(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents: Any = None) -> Any:  # type: ignore[override]
        plain = as_plain(self, requires_grad=False)
        # torch's printing is made of ops on the tensor, which are no part of the program.
        with torch._C._DisableTorchDispatch():
            text: str = torch.Tensor.__repr__(plain, tensor_contents=tensor_contents)  # type: ignore[call-arg]
        history = _history(self)
        # torch's own way to add words, which may begin a new line.
        return _tensor_str._add_suffixes(text[:-1], [history], len("tensor("), False) if history else text

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        if self.dim() == 0:
            return self.item().__format__(spec)
        return object.__format__(as_plain(self), spec) if spec else str(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return as_plain(self).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        if id(self) in memo:
            found: torch.Tensor = memo[id(self)]
            return found
        if not self.is_leaf:
            # Raises, in torch's words: only a leaf can be copied.
            with torch._C._DisableTorchDispatch(), torch.enable_grad():
                return (as_plain(self, requires_grad=True) * 1).__deepcopy__(memo)
        copy = as_plain(self).__deepcopy__({})
        if self.grad is not None:
            copy.grad = self.grad.__deepcopy__(memo)
        memo[id(self)] = copy
        return copy

    def __coerce_same_metadata_as_tangent__(self, metadata: Any, expected: type | None = None) -> torch.Tensor | None:
        """torch.compile's backward asks for a gradient of the type that its forward was compiled for."""
        return as_plain(self) if expected is torch.Tensor else None

    @property
    def requires_grad(self) -> bool:  # type: ignore[override]
        return self.cell.owed is not None or _requires_grad.__get__(self)

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self._own_up()
        _requires_grad.__set__(self, value)

    @property
    def is_leaf(self) -> bool:  # type: ignore[override]
        return self.cell.owed is None and _told(_is_leaf, self)  # type: ignore[no-any-return]

    @property
    def grad_fn(self) -> Any:  # type: ignore[override]
        self._own_up()
        return _told(_grad_fn, self)

    @property
    def grad(self) -> Any:
        # Of what is no leaf, torch warns.
        self._own_up()
        return _grad.__get__(self)

    @grad.setter
    def grad(self, value: Any) -> None:  # type: ignore[override]
        self._own_up()
        self.cell.home = None
        _grad.__set__(self, value)

    @grad.deleter
    def grad(self) -> None:  # type: ignore[override]
        _grad.__delete__(self)

    def requires_grad_(self, requires_grad: bool = True) -> "LazyTensor":
        """As in torch, and autograd has to do with it from now on."""
        self._own_up()
        self.cell.home = None
        torch._C.TensorBase.requires_grad_(self, requires_grad)
        return self

    def _own_up(self) -> None:
        if self.cell.owed is not None:
            self.cell.region.recorder.lane.own_up([self])

    @property
    def data(self) -> torch.Tensor:
        return _data.__get__(self)  # type: ignore[no-any-return]

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        _replace_data(self.cell.region.recorder, self, value)


def _replace_data(recorder: Any, tensor: LazyTensor, value: torch.Tensor) -> None:
    """From now on the wrapper stands for the value's memory."""
    if not isinstance(value, torch.Tensor):
        # It raises.
        _data.__set__(tensor, value)
    with recorder.lock:
        recorder.flush(Barrier.DOOR)
        if type(value) is LazyTensor:
            real = value.cell.region.recorder.materialize(value.cell, Barrier.DOOR)
        else:
            with torch._C._DisableTorchDispatch(), torch.no_grad():
                real = value.detach()
        _try_data(tensor, real)
        if real.device != tensor.device:
            raise RuntimeError(
                f".data of a tensor on {tensor.device}, recorded by Kitsune, cannot become one on {real.device}: make a new "
                "tensor instead, or put the assignment under kitsune.disable()."
            )
        recorder.stand_for(tensor, real)


def _try_data(tensor: LazyTensor, real: torch.Tensor) -> None:
    """Raise what torch raises where such a tensor may not be the data of the other, whatever records it."""
    with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch(), torch.inference_mode(False):
        like = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        can = like.dtype.is_floating_point or like.dtype.is_complex
        _data.__set__(like.requires_grad_(can and tensor.requires_grad), real)


def _told(attribute: Any, tensor: torch.Tensor) -> Any:
    """What autograd tells of a tensor's history."""
    try:
        return attribute.__get__(tensor)
    except RuntimeError as error:
        in_eagers_words(error)
        raise


_data: Any = torch._C.TensorBase.data  # type: ignore[attr-defined]
_requires_grad: Any = torch._C.TensorBase.requires_grad
_is_leaf: Any = torch._C.TensorBase.is_leaf
_grad: Any = torch._C.TensorBase.grad
_grad_fn: Any = torch._C.TensorBase.grad_fn


for _name in ("data", "requires_grad", "is_leaf", "grad_fn"):
    # What torch does not allow it refuses in its own words.
    _own, _torchs = vars(LazyTensor)[_name], getattr(torch._C.TensorBase, _name)
    setattr(LazyTensor, _name, property(_own.fget, _own.fset or _torchs.__set__, _torchs.__delete__))


def _history(tensor: "LazyTensor") -> str:
    """What torch prints of a tensor's place in the autograd graph."""
    if tensor.cell.owed is not None:
        return f"grad_fn=<{tensor.cell.owed.graded}>"
    try:
        grad_fn = tensor.grad_fn
    except RuntimeError:
        # A view made under no_grad and then written with gradients on.
        return "grad_fn=<Invalid>"
    if grad_fn is None:
        return "requires_grad=True" if tensor.requires_grad else ""
    name = type(grad_fn).__name__
    return f"grad_fn=<{grad_fn.name().rpartition('::')[2] if name == 'CppFunction' else name}>"


def _door(name: str, method: bool) -> Any:
    original = getattr(torch.Tensor, name)
    if not method:
        return property(lambda self: getattr(as_plain(self), name))

    def door(self: LazyTensor, *args: Any, **kwargs: Any) -> Any:
        plain = as_plain(self)
        if name == "__dlpack__":
            share(plain)
        with torch._C._DisableTorchDispatch():
            return original(plain, *args, **kwargs)

    door.__name__ = name
    door.__doc__ = f"As torch.Tensor.{name}, once the value has been computed."
    return door


METHOD_DOORS = tuple(
    name
    for name in (
        "numpy tolist data_ptr const_data_ptr untyped_storage storage _typed_storage __dlpack__ __dlpack_device__ "
        "__array__ share_memory_ is_shared is_pinned pin_memory"
    ).split()
    if hasattr(torch.Tensor, name)
)
for _name in METHOD_DOORS:
    setattr(LazyTensor, _name, _door(_name, method=True))
setattr(LazyTensor, "__cuda_array_interface__", _door("__cuda_array_interface__", method=False))  # noqa: B010


def _number(name: str) -> Any:
    original = getattr(torch.Tensor, name)

    @functools.wraps(original)
    def number(self: LazyTensor) -> Any:
        # C++ makes a tensor of a list of these with the dispatcher's Python switched off.
        beneath = torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.Python)
        return original(as_plain(self) if beneath else self)

    return number


for _name in ("__bool__", "__int__", "__index__", "__float__", "__complex__"):
    setattr(LazyTensor, _name, _number(_name))


@functools.cache
def wrapper_maker(type_: TensorType) -> Callable[[], LazyTensor]:
    """A function that makes wrappers of one type.

    Of 1.8 us a call, arguments by position save 0.4, and leaving strides to torch where they are the default saves 0.3.
    """
    default = type_.canonical and not type_.offset
    make: Callable[[], LazyTensor] = functools.partial(
        torch.Tensor._make_wrapper_subclass,  # type: ignore[arg-type]
        LazyTensor,
        type_.shape,
        None if default else type_.stride,
        None if default else type_.offset,
        None,
        type_.dtype,
        torch.strided,
        type_.device,
    )
    return functools.partial(_make_marked, make, type_) if type_.conj or type_.neg else make


def _make_marked(make: Callable[[], LazyTensor], type_: TensorType) -> LazyTensor:
    tensor = make()
    torch._C._set_conj(tensor, type_.conj)
    torch._C._set_neg(tensor, type_.neg)
    return tensor


def wrap(cell: Cell) -> LazyTensor:
    """A new wrapper of a cell, with the geometry of the cell's type."""
    tensor = wrapper_maker(cell.type)()
    tensor.cell = cell
    return tensor


def as_plain(tensor: LazyTensor, requires_grad: bool | None = None, owned: bool = True) -> torch.Tensor:
    """The computed value as a plain leaf on the same memory; `requires_grad` is the wrapper's own unless given.

    The memory is its own for good if `owned`; else a captured graph may write it again.
    """
    real = tensor.cell.region.recorder.materialize(tensor.cell, Barrier.DOOR)
    if owned:
        own(real)
    # An alias of an inference tensor can be made in inference mode only, of any other only outside.
    inference = real.is_inference()
    with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch(), torch.no_grad(), torch.inference_mode(inference):
        plain: torch.Tensor = real.detach()
        # In place, a bool tensor can get a history: `mask[0] = loss`. No leaf of that dtype can.
        can = plain.dtype.is_floating_point or plain.dtype.is_complex
        if inference:
            return plain
        return plain.requires_grad_(can and (tensor.requires_grad if requires_grad is None else requires_grad))


def _lazy_tensors(tree: Any) -> Any:
    if isinstance(tree, LazyTensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for x in tree:
            yield from _lazy_tensors(x)
    elif isinstance(tree, dict):
        for x in tree.values():
            yield from _lazy_tensors(x)
