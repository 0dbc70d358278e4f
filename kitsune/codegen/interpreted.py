"""Stands in for CUDA's math library where kernels run in Triton's interpreter, which has none: float64 arithmetic, rounded once.

Only kernels rendered for the interpreter import this, and it imports Triton.
"""

from collections.abc import Callable
from typing import Any

import numpy
import torch
import triton.language as tl
from triton.runtime.interpreter import TensorHandle

_NUMPY = {"fp64": numpy.float64, "fp32": numpy.float32, "i64": numpy.int64, "i32": numpy.int32, "i1": numpy.bool_}


def argument(value: Any, type_: str) -> tl.tensor:
    """A kernel's argument of a type as in a signature; a pointer is an address."""
    if type_.startswith("*"):
        pointee = tl.dtype({"u8": "uint8"}.get(type_[1:], type_[1:].replace("i", "int")))
        kind: Any = tl.pointer_type(pointee)
        return tl.tensor(TensorHandle(numpy.array([value], dtype=numpy.uint64), kind), kind)
    kind = tl.dtype(type_.replace("i", "int"))
    return tl.tensor(TensorHandle(numpy.array([value], dtype=_NUMPY[type_]), kind), kind)


def _apply(function: Callable[..., torch.Tensor], *operands: Any) -> tl.tensor:
    like = next(x for x in operands if isinstance(x, tl.tensor) and x.type.is_block()) if _has_block(operands) else operands[0]
    typed = next(x for x in operands if isinstance(x, tl.tensor))
    arrays = [x.handle.data if isinstance(x, tl.tensor) else numpy.array(_plain(x)) for x in operands]
    result = function(*(torch.from_numpy(a.astype(numpy.float64)) for a in arrays)).numpy()
    scalar = typed.dtype
    data: numpy.ndarray = result.astype(_NUMPY[scalar.name])
    kind = tl.block_type(scalar, list(data.shape)) if isinstance(like, tl.tensor) and like.type.is_block() else scalar
    return tl.tensor(TensorHandle(data, scalar), kind)


def _has_block(operands: tuple[Any, ...]) -> bool:
    return any(isinstance(x, tl.tensor) and x.type.is_block() for x in operands)


def _plain(x: Any) -> Any:
    return getattr(x, "value", x)


def _named(function: Callable[..., torch.Tensor]) -> Callable[..., tl.tensor]:
    return lambda *operands: _apply(function, *operands)


exp = _named(torch.exp)
ex2 = exp2 = _named(torch.exp2)
expm1 = _named(torch.expm1)
log = _named(torch.log)
log2 = _named(torch.log2)
log10 = _named(torch.log10)
log1p = _named(torch.log1p)
sin = _named(torch.sin)
cos = _named(torch.cos)
tan = _named(torch.tan)
asin = _named(torch.asin)
acos = _named(torch.acos)
atan = _named(torch.atan)
atan2 = _named(torch.atan2)
sinh = _named(torch.sinh)
cosh = _named(torch.cosh)
tanh = _named(torch.tanh)
asinh = _named(torch.asinh)
acosh = _named(torch.acosh)
atanh = _named(torch.atanh)
erf = _named(torch.erf)
erfc = _named(torch.erfc)
erfinv = _named(torch.erfinv)
lgamma = _named(torch.lgamma)
rsqrt = _named(lambda x: 1 / torch.sqrt(x))
pow = _named(torch.pow)
fmod = _named(torch.fmod)
hypot = _named(torch.hypot)
copysign = _named(torch.copysign)
floor = _named(torch.floor)
ceil = _named(torch.ceil)
trunc = _named(torch.trunc)
nearbyint = _named(torch.round)
fmax = _named(torch.fmax)
fmin = _named(torch.fmin)
# The product is exact in float64, and the sum is rounded twice only next to a tie.
fma = _named(lambda a, b, c: a * b + c)


def to_bf16(x: tl.tensor) -> tl.tensor:
    """Rounded to nearest even; the interpreter's own conversion cuts off."""
    data = torch.from_numpy(x.handle.data.copy()).to(torch.bfloat16).to(torch.float32).numpy()
    return tl.tensor(TensorHandle(data, x.dtype), x.type)
