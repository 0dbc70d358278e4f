"""Functions of torch's API that are no part of what is followed, by what they could tell or change."""

import inspect
from typing import Any

import torch
from torch import Tensor

from kitsune.lazy.tensor import LazyTensor

_PROPERTIES = (
    "shape dtype device layout ndim itemsize nbytes is_cuda is_cpu is_sparse is_sparse_csr is_quantized is_nested is_meta is_mps "
    "is_xpu is_ipu is_xla is_mkldnn is_mtia is_vulkan is_maia requires_grad is_leaf names"
)
_METHODS = (
    "size stride dim ndimension numel nelement element_size is_contiguous is_floating_point is_complex is_signed storage_offset "
    "get_device is_same_size is_conj is_neg is_inference __len__ dim_order has_names is_set_to is_coalesced"
)
_FUNCTIONS = "is_floating_point is_complex is_signed numel is_same_size is_conj is_neg is_inference can_cast promote_types"


_GRAD: Any = Tensor.grad
_OWN = frozenset({Tensor, torch.nn.Parameter, LazyTensor})


def _getter(name: str) -> object:
    return getattr(Tensor, name).__get__


def _found(owner: object, names: str) -> set[object]:
    return {getattr(owner, name) for name in names.split() if hasattr(owner, name)}


# They tell what a wrapper knows by itself, or set a gradient.
HARMLESS = frozenset(
    {_getter(name) for name in _PROPERTIES.split() if hasattr(Tensor, name)}
    | _found(Tensor, _METHODS)
    | _found(torch, _FUNCTIONS)
    | {torch._C._set_grad_enabled}
    | {_GRAD.__get__, _GRAD.__set__, _GRAD.__delete__}
)

# They ask for a value, and leave it as it is.
VALUES = frozenset(
    _found(
        Tensor,
        "item tolist numpy __bool__ __float__ __int__ __index__ __complex__ __array__ __repr__ __format__ __deepcopy__ "
        "__reduce_ex__ "
        "data_ptr const_data_ptr storage untyped_storage _typed_storage __dlpack__ __dlpack_device__ __contains__ __hash__ "
        "is_shared is_pinned __dir__",
    )
)
# They read one number, and what they make of it. (A number that is no whole one is refused as an index, in words of torch's.)
READS: dict[object, Any] = {Tensor.item: lambda number: number, Tensor.__bool__: bool, Tensor.__float__: float}
# Of these dtypes Python makes of a number what torch does.
SIMPLE = frozenset({torch.bool, torch.int64, torch.int32, torch.float64, torch.float32, torch.bfloat16, torch.float16})


def is_simple(tensor: object) -> bool:
    """Is this one number that is not computed yet, of such a dtype?"""
    return type(tensor) is LazyTensor and (type_ := tensor.cell.type).dtype in SIMPLE and type_.shape.numel() == 1


# They ask for a value, or for a place in the graph.
ASKS = VALUES | frozenset(
    {_getter(name) for name in "grad_fn _version _base data output_nr retains_grad name _backward_hooks".split()}
    | _found(Tensor, "_is_view")
)

# With what they give a program can put a hook, of which no call tells, between two operators of a backward.
SHOWS_GRAPH = frozenset({_getter("grad_fn")})

# What they return has no history, whatever they are given.
DETACHES = frozenset({Tensor.detach, torch.detach})

# What they return has none either, and they make none on the way (`argsort` does): they ask which numbers are alike, or larger.
_ASKING = (
    "argmax argmin eq ne lt le gt ge not_equal less less_equal greater greater_equal isnan isinf isposinf isneginf "
    "signbit any all logical_and logical_or logical_xor logical_not count_nonzero"
)
UNGRADED = _found(torch, _ASKING) | _found(Tensor, f"{_ASKING} __eq__ __ne__ __lt__ __le__ __gt__ __ge__")

# They make of their first operand what is like the second, which they know by its shape and dtype.
LIKE_ANOTHER = _found(Tensor, "expand_as view_as reshape_as type_as")

# They view their operands as matrices: of a batch of three dimensions that is part of what they do.
PRODUCTS = frozenset(
    _found(torch.nn.functional, "linear") | _found(torch, "matmul") | _found(Tensor, "matmul __matmul__ __rmatmul__")
)

# How products and backwards see all of a tensor in another shape. Of which part a backward in Python takes a view may change.
_aten = torch.ops.aten
WHOLE_VIEWS = frozenset(
    {
        _aten.t.default,
        _aten.transpose.int,
        _aten.permute.default,
        _aten.view.default,
        _aten.expand.default,
        _aten.unsqueeze.default,
    }
)

# They say whether a leaf collects a gradient: nobody else's affair while the region does not know the leaf.
FLAGS = frozenset({Tensor.requires_grad_, getattr(Tensor, "requires_grad").__set__})  # noqa: B009

# From here on autograd, or the program, does something that the calls alone do not show.
REACHES_GRAPH = frozenset(
    {torch.autograd.grad}
    | {getattr(Tensor, name).__set__ for name in "requires_grad data _backward_hooks".split()}
    | _found(
        Tensor,
        "requires_grad_ detach_ register_hook retain_grad register_post_accumulate_grad_hook set_ resize_ resize_as_ "
        "share_memory_ "
        "as_subclass rename_",
    )
)


def is_foreign(func: object) -> bool:
    """Is this not torch's own? A library's function may ask as torch's do before it does anything."""
    module = getattr(func, "__module__", None)
    # A door of ours goes by the name of what it stands before.
    return isinstance(module, str) and module.partition(".")[0] not in ("torch", "kitsune")


def stays(func: object, args: Any, kwargs: Any) -> bool:
    """Is this `x.to(device)` of an x that is there? It returns x and nothing is recorded: clipping asks so for each gradient."""
    if func is not Tensor.to or kwargs or len(args) != 2 or type(args[1]) is not torch.device:
        return False
    return type(args[0]) is LazyTensor and bool(args[0].device == args[1])


def is_ungraded(func: object, args: Any, kwargs: Any) -> bool:
    """Does a call neither read nor make a history, whatever it is given? What takes torch's calls itself may give it one.

    It is made under no_grad, by which who is let in with a history is marked as one that was looked at.
    """
    return func in UNGRADED and all(
        type(a) in _OWN or not hasattr(type(a), "__torch_function__") for a in (*args, *kwargs.values())
    )


# They write their first argument if they are asked to.
IN_PLACE = frozenset(
    function
    for function in vars(torch.nn.functional).values()
    if inspect.isfunction(function) and "inplace" in inspect.signature(function).parameters
)


def may_write(func: object, args: Any, kwargs: Any) -> bool:
    """Does a call write its first argument, by its name?"""
    if "out" in kwargs or (func in IN_PLACE and (kwargs.get("inplace") or any(a is True for a in args[1:]))):
        return True
    name = getattr(func, "__name__", "")
    if name.startswith("__"):
        reads = ("__invert__", "__index__", "__int__", "__iter__")
        return name == "__setitem__" or (name.startswith("__i") and name not in reads)
    return name.endswith("_")
