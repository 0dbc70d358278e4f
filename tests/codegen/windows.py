"""Pooling of all sizes and layouts, and images of NaN and infinities, for the interpreter and for a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

aten = torch.ops.aten
# Shape, size of the windows, stride, padding, whether a last window may begin beyond the image.
SHAPES = [
    ((2, 16, 9, 11), (3, 3), (2, 2), (1, 1), False),
    ((2, 16, 8, 6), (2, 2), (), (), False),
    ((1, 5, 7, 7), (3, 3), (1, 1), (1, 1), False),
    ((2, 3, 10, 5), (3, 2), (2, 3), (0, 1), True),
    ((3, 1, 5, 9), (5, 3), (1, 2), (2, 1), False),
    ((1, 4, 1, 6), (1, 4), (1, 1), (0, 2), False),
    ((2, 4, 6, 1), (2, 1), (3, 1), (0, 0), False),
]


def pooled(options: tuple[Any, ...], last: bool) -> Callable[..., list[torch.Tensor]]:
    """Forward with positions, and backward of a gradient with either layout."""
    size, stride, padding, beyond = options
    format_ = torch.channels_last if last else torch.contiguous_format

    def program(x: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
        x = (x * 1).contiguous(memory_format=format_)
        y, places = aten.max_pool2d_with_indices(x, size, stride, padding or (0, 0), (1, 1), beyond)
        rows = (grad[: y.numel()].view_as(y) * 1).contiguous(memory_format=format_)
        into = aten.max_pool2d_with_indices_backward(rows, x, size, stride, padding or (0, 0), (1, 1), beyond, places)
        return [y * 1, places + 0, into * 1]

    return program


def drawn(shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    """Few different numbers, so that the first of equal ones counts; NaN, infinities, a corner of nothing but minus infinity,
    and numbers that float16 does not have."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-3, 4, shape, generator=generator).to(dtype)
    flat = x.view(-1)
    flat[5::37], flat[11::41], flat[3::29] = float("nan"), float("inf"), float("-inf")
    flat[7::43] = 1e30 if dtype is not torch.float16 else 6e4
    x[0, 0, :2, :2] = float("-inf")
    return [x, torch.randn(4 * x.numel() + 64, generator=generator).to(dtype)]


def cases(dtype: torch.dtype) -> Iterator[tuple[str, Callable[..., list[torch.Tensor]], list[torch.Tensor]]]:
    for shape, *options in SHAPES:
        for last in (False, True):
            yield f"{shape} {options} {last} {dtype}", pooled(tuple(options), last), drawn(shape, dtype)


def differs(got: list[torch.Tensor], eager: list[torch.Tensor], exact: list[torch.Tensor]) -> str | None:
    """Values and places have eager's bits, strides too; a gradient is summed in float32 and rounded once."""
    for name, a, b in zip(("value", "place"), got, eager, strict=False):
        if a.stride() != b.stride() or not torch.equal(a.nan_to_num(7), b.nan_to_num(7)) or a.isnan().ne(b.isnan()).any():
            return f"{name} at {(a.nan_to_num(7) != b.nan_to_num(7)).nonzero()[:3].tolist()}"
    a, c = got[2], exact[2].float().to(got[2].dtype)
    bound = torch.finfo(a.dtype).eps * c.float().abs() + 4e-7 * 25
    return None if bool(((a.float() - c.float()).abs() <= bound).all()) else "gradient"
