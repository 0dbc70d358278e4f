"""What a dtype is in memory, in a register and in arithmetic, and how eager converts between them.

A register holds bfloat16 and float16 values widened to float32, bool as int1, and everything else as itself.
"""

from collections.abc import Iterable

import torch

HALF = (torch.bfloat16, torch.float16)
FLOATING = (*HALF, torch.float32, torch.float64)
INTEGRAL = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
SUPPORTED = frozenset((*FLOATING, *INTEGRAL, torch.bool))

# In a pointer's type. A pointer to int1 is addressed in bits by some releases of Triton, so bool is a byte.
MEMORY = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i8",
}

LANGUAGE = {
    torch.float64: "tl.float64",
    torch.float32: "tl.float32",
    torch.bfloat16: "tl.bfloat16",
    torch.float16: "tl.float16",
    torch.int64: "tl.int64",
    torch.int32: "tl.int32",
    torch.int16: "tl.int16",
    torch.int8: "tl.int8",
    torch.uint8: "tl.uint8",
    torch.bool: "tl.int1",
}


def opmath(dtype: torch.dtype) -> torch.dtype:
    """What eager's CUDA kernels compute in: float32 for the half types."""
    return torch.float32 if dtype in HALF else dtype


def cast(text: str, source: torch.dtype, target: torch.dtype, used: set[str]) -> str:
    """A register's text as a value of another dtype, rounded as eager rounds; adds the helpers that it calls to `used`."""
    if source is target or (source in HALF and target is torch.float32):
        return text
    if target is torch.bool:
        return f"({text} != 0)"
    if target in HALF:
        helper = "to_bf16" if target is torch.bfloat16 else "to_fp16"
        used.add(helper)
        return f"{helper}({_as_float32(text, source)})"
    if source in FLOATING and target in INTEGRAL:
        return _float_to_int(text, target)
    return f"{text}.to({LANGUAGE[target]})"


def _as_float32(text: str, source: torch.dtype) -> str:
    return text if source in HALF or source is torch.float32 else f"{text}.to(tl.float32)"


def _float_to_int(text: str, target: torch.dtype) -> str:
    # uint8 goes through int64 in eager, so that -1.0 becomes 255 on every device; int8 and int16 through int32.
    if target is torch.uint8:
        return f"{text}.to(tl.int64).to(tl.uint8)"
    if target in (torch.int8, torch.int16):
        return f"{text}.to(tl.int32).to({LANGUAGE[target]})"
    return f"{text}.to({LANGUAGE[target]})"


def common_dtype(tensors: Iterable[tuple[torch.dtype, int]], numbers: Iterable[type]) -> torch.dtype:
    """The dtype that operands meet in: `tensors` are (dtype, number of dimensions), `numbers` types of Python scalars.

    As torch.result_type: tensors with dimensions decide the type inside a category (bool < int < float), then 0-dim
    tensors, then numbers; a lower kind of operand counts only by a higher category.
    """
    with_dims: torch.dtype | None = None
    zero_dim: torch.dtype | None = None
    for dtype, n_dims in tensors:
        if n_dims:
            with_dims = dtype if with_dims is None else torch.promote_types(with_dims, dtype)
        else:
            zero_dim = dtype if zero_dim is None else torch.promote_types(zero_dim, dtype)
    wrapped: torch.dtype | None = None
    for number in numbers:
        dtype = _NUMBERS[number] if number is not float else torch.get_default_dtype()
        wrapped = dtype if wrapped is None else torch.promote_types(wrapped, dtype)
    result = _combine(_combine(with_dims, zero_dim), wrapped)
    return result or torch.float32


_NUMBERS = {bool: torch.bool, int: torch.int64}


def _combine(higher: torch.dtype | None, lower: torch.dtype | None) -> torch.dtype | None:
    if higher is None or lower is None:
        return higher or lower
    if higher.is_floating_point:
        return higher
    if higher is torch.bool or lower.is_floating_point:
        return torch.promote_types(higher, lower)
    return higher
