"""Which ops choose their algorithm by the memory format of their operands, and how strides go through those that do not."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from kitsune.ir import Op, Result, TensorType, tensor_type

HALF = {torch.float16, torch.bfloat16}
# A library's kernels for 16 bits take channels in vectors of 8; others are padded by it, or have kernels of another kind.
VECTOR = 8


@dataclass(frozen=True, slots=True)
class Row:
    """An op that follows the format of its operands: the positions of those that must agree, and of what it then returns so.

    `weight` is the position of a convolution's weight, which nobody else reads, among operands and among results.
    """

    operands: tuple[int, ...]
    results: tuple[int, ...] = (0,)
    weight: tuple[int, ...] = ()
    grad_weight: tuple[int, ...] = ()


ROWS: dict[str, Row] = {
    "convolution": Row((0,), weight=(1,)),
    "convolution_backward": Row((0, 1), weight=(2,), grad_weight=(1,)),
    "native_batch_norm": Row((0,)),
    "native_batch_norm_backward": Row((0, 1)),
    "cudnn_batch_norm": Row((0,)),
    "cudnn_batch_norm_backward": Row((0, 1)),
    "max_pool2d_with_indices": Row((0,), (0, 1)),
    "max_pool2d_with_indices_backward": Row((0, 1, 7)),
    "avg_pool2d": Row((0,)),
    "avg_pool2d_backward": Row((0, 1)),
    "_adaptive_avg_pool2d": Row((0,)),
    "_adaptive_avg_pool2d_backward": Row((0, 1)),
}
CONVOLUTIONS = ("convolution", "convolution_backward")


def why_not_channels_last(op: Op) -> str | None:
    """Why an op cannot work in channels-last; None if it can, and then it does so if its operands say so."""
    row = ROWS.get(op.target._opname)
    if row is None or op.target._overloadname != "default":
        return f"{op.target} is not known to follow the format of its operands"
    if any(len(op.args[k].type.shape) != 4 for k in row.operands):
        return "it is not on images with channels"
    # In 32 bits, with TF32, ResNet-50 takes 21.0 ms instead of 30.1 (H200, `benchmarks.train_step --precision tf32`).
    if op.args[row.operands[0]].type.dtype not in (*HALF, torch.float32):
        return "it is in more than 32 bits"
    if row.weight:
        groups, transposed = (op.args[8], op.args[6]) if op.target._opname == "convolution" else (op.args[9], op.args[7])
        if groups != 1:
            return "it is grouped, and the library has other kernels for that"
        if transposed:
            return "it is transposed"
    return None


def in_vectors(op: Op) -> bool:
    """Are a convolution's channels a multiple of what the library's kernels take at once?"""
    (weight,) = ROWS[op.target._opname].weight
    return all(n % VECTOR == 0 for n in op.args[weight].type.shape[:2])


def results_at(op: Op, positions: Sequence[int]) -> list[int]:
    """The numbers of the results that the call returns at these positions; one that was not asked for has none."""
    parts = op.structure if isinstance(op.structure, (list, tuple)) else [op.structure]
    return [parts[k].index for k in positions if k < len(parts) and isinstance(parts[k], Result)]


def with_strides(type_: TensorType, stride: tuple[int, ...]) -> TensorType:
    """The type of the same elements with other strides, from the start of their memory."""
    return tensor_type(type_.dtype, type_.shape, stride, 0, type_.device)


def with_shape(type_: TensorType, shape: torch.Size) -> TensorType:
    """A contiguous type with the dtype and the device of another one."""
    return tensor_type(type_.dtype, shape, _filled(shape, range(len(shape) - 1, -1, -1)), 0, type_.device)


@cache
def contiguous(type_: TensorType) -> TensorType:
    """The type in torch's default format."""
    return with_shape(type_, type_.shape)


@cache
def channels_last(type_: TensorType) -> TensorType:
    """The type in channels-last, as torch gives it to a new tensor."""
    return with_strides(type_, _filled(type_.shape, (1, 3, 2, 0)))


def is_channels_last(type_: TensorType) -> bool:
    """Is it in channels-last, and not in the default format as well?"""
    return len(type_.shape) == 4 and same_places(type_, channels_last(type_)) and not same_places(type_, contiguous(type_))


def same_places(a: TensorType, b: TensorType) -> bool:
    """Does each element lie at the same place? Strides along dimensions of size 1 do not count."""
    return all(n == 1 or s == t for n, s, t in zip(a.shape, a.stride, b.stride, strict=True))


def elementwise(shape: torch.Size, operands: Sequence[TensorType]) -> tuple[int, ...]:
    """The strides that torch gives to a new result of a pointwise op."""
    if operands and all(t.shape == shape for t in operands):
        formats = (contiguous, channels_last) if len(shape) == 4 else (contiguous,)
        for format_ in formats:
            if all(same_places(t, format_(t)) for t in operands):
                return format_(operands[0]).stride
        if all(t.stride == operands[0].stride for t in operands) and is_dense(operands[0]):
            return operands[0].stride
    return _filled(shape, _order(shape, [_broadcast(t, shape) for t in operands]))


def is_dense(type_: TensorType) -> bool:
    """Do the elements fill their memory without gaps, each once?"""
    step = 1
    for stride, n in sorted((s, n) for s, n in zip(type_.stride, type_.shape, strict=True) if n > 1):
        if stride != step:
            return False
        step *= n
    return True


def _filled(shape: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """Strides without gaps, dimensions coming in this order, the innermost first."""
    stride, step = [0] * len(shape), 1
    for d in order:
        stride[d] = step
        step *= max(shape[d], 1)
    return tuple(stride)


def _broadcast(type_: TensorType, shape: torch.Size) -> tuple[int, ...]:
    missing = len(shape) - len(type_.shape)
    grown = zip(type_.shape, type_.stride, shape[missing:], strict=True)
    return (0,) * missing + tuple(0 if n == 1 and m != 1 else s for n, s, m in grown)


def _order(shape: torch.Size, strides: Sequence[tuple[int, ...]]) -> list[int]:
    """Dimensions, innermost first, as torch sorts them: the first operand that tells two of them apart decides."""
    order = list(range(len(shape) - 1, -1, -1))
    for i in range(1, len(order)):
        at = i
        for below in range(i - 1, -1, -1):
            sign = _compare(shape, strides, order[below], order[at])
            if sign > 0:
                order[below], order[at], at = order[at], order[below], below
            elif sign < 0:
                break
    return order


def _compare(shape: torch.Size, strides: Sequence[tuple[int, ...]], a: int, b: int) -> int:
    for stride in strides:
        if not stride[a] or not stride[b]:
            continue
        if stride[a] != stride[b]:
            return -1 if stride[a] < stride[b] else 1
        if shape[a] > shape[b]:
            return 1
    return 0
