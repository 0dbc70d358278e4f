"""Where the rows of a reduction are cut, so that there are enough parts for the device."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kitsune.ir import Op, Reduction, TensorType

HALF = (torch.bfloat16, torch.float16)
# The parts must be equal: up to this factor more or fewer of them than wanted are taken.
MORE, FEWER = 4, 16
# Elements of a row that a part must have where any number of parts above the wanted one would do: fewer are much to write. Those
# that a kernel along rows may add up are read by nobody otherwise, so that more written pay.
LEAST, LEAST_BESIDE = 32, 8
# Neighbours from which on they are a row of their own, where a row consists of several such runs: to walk all of them in one row
# takes a division for each element. Of fewer elements in all, that is faster than another launch.
RUN, RUNS_FROM = 512, 1 << 20

# The number of parts wanted for a reduction of `rows` rows of so many columns; then: do neighbours belong to one row, and may a
# kernel along what are columns here make the parts beside what it does?
Parts = Callable[[int, int, bool, bool], int]


@dataclass(frozen=True, slots=True)
class Cut:
    """A dimension is seen as so many parts; dimensions in `whole` are left to the second stage as they are.

    A part is a stretch of the dimension, or with `in_turn` every so manyth element of it.
    """

    dim: int
    parts: int
    whole: frozenset[int]
    in_turn: bool = False


def find_cut(op: Op, reduction: Reduction, parts: Parts, made: TensorType, beside: bool = False) -> Cut | None:
    """Where to cut a reduction's rows; None if they are best left whole, or cannot be cut evenly.

    `made` is what its operand is a view of; `beside`: a kernel along its columns has it in registers.
    """
    type_ = op.inputs[0].type
    if op.results[0].type.dtype in HALF and type_.dtype not in HALF:
        return None  # rounded before it is summed
    shape, stride = type_.shape, type_.stride
    columns = math.prod(shape[d] for d in reduction.dims)
    if not columns:
        return None
    moving = [d for d in range(len(shape)) if shape[d] > 1 and stride[d]]
    inner = not moving or min(moving, key=lambda d: stride[d]) in reduction.dims
    if inner and (cut := _in_runs(type_, reduction, parts)) is not None:
        return cut
    beside = beside and not inner
    wanted = parts(type_.shape.numel() // columns, columns, inner, beside)
    if beside and wanted > 1:
        # However the rows are dimensions of an op, all that one kernel adds up has the same parts.
        wanted = _nearest(_divisors(columns), wanted)
    least = LEAST_BESIDE if beside else LEAST
    cut = None if inner else _in_turn(type_, reduction, wanted, columns, made, least)
    if cut is None or (cut.parts > MORE * wanted and not cut.whole):
        # Of 197 parts with 64 rows each a block has hardly begun when it is done: ViT-B/16's sums took 29 us of an H200 so, where
        # the bytes take 14.
        cut = _in_stretches(type_, reduction, wanted) or cut
    return cut


def _in_runs(type_: TensorType, reduction: Reduction, parts: Parts) -> Cut | None:
    """Each run of neighbours by itself, where there are enough of them for the device: the channels of contiguous images."""
    run, whole = 1, set[int]()
    for d in sorted(reduction.dims, key=lambda d: type_.stride[d]):
        n, step = type_.shape[d], type_.stride[d]
        if n > 1 and (whole or step != run):
            whole.add(d)
        else:
            run *= n
    n = type_.shape.numel()
    return _whole_cut(whole, reduction) if run >= RUN and n >= RUNS_FROM and parts(n // run, run, True, False) == 1 else None


def _in_turn(type_, reduction: Reduction, wanted: int, columns: int, made: TensorType, least: int) -> Cut | None:
    """Where neighbours belong to different rows: blocks at work together then read what lies together.

    Stretches a large power of two apart load few of the memory's channels at a time: batch norm's backward behind a threshold
    took 405 us so on an H200, of which the bytes are 103.
    """
    shape, stride = type_.shape, type_.stride
    left, whole = wanted, set[int]()
    for d in sorted(reduction.dims, key=lambda d: stride[d]):
        if left <= 1:
            break
        n = shape[d]
        if n > left:
            fitting = [k for k in _divisors(n) if k >= left / FEWER and columns // k >= least and _fits(k * stride[d], made)]
            n = _nearest(fitting, left)
        if n == 1 < shape[d]:
            return None
        if n < shape[d]:
            return Cut(d, n, frozenset(whole), True)
        whole.add(d)
        left, columns = -(-left // n), columns // n
    return _whole_cut(whole, reduction)


def _fits(step: int, made: TensorType) -> bool:
    """Is a tensor cut between its dimensions, or evenly in one, at every `step` elements? What makes it can join then."""
    return all(n == 1 or not s or step % s == 0 or s % step == 0 for n, s in zip(made.shape, made.stride, strict=True))


def _in_stretches(type_: TensorType, reduction: Reduction, wanted: int) -> Cut | None:
    left, whole = wanted, set[int]()
    for d in sorted(reduction.dims, key=lambda d: -type_.stride[d]):
        n = type_.shape[d]
        if left <= 1:
            break
        if n <= left:
            whole.add(d)
            left = -(-left // n)
            continue
        near = [k for k in _divisors(n) if left / FEWER <= k <= left * MORE]
        k = _nearest(near, left)
        return Cut(d, k, frozenset(whole)) if k > 1 else _whole_cut(whole, reduction)
    return _whole_cut(whole, reduction)


def _whole_cut(whole: set[int], reduction: Reduction) -> Cut | None:
    return Cut(-1, 1, frozenset(whole)) if whole and whole != set(reduction.dims) else None


def _nearest(numbers: list[int], wanted: int) -> int:
    return min(numbers, key=lambda k: (abs(math.log(k / wanted)), k), default=1)


def _divisors(n: int) -> list[int]:
    return [d for k in range(1, math.isqrt(n) + 1) if n % k == 0 for d in {k, n // k}]
