"""Programs with reductions, for the interpreter, the compiler and a GPU: what they take, and how near eager they must be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from tests.behind import behind

aten = torch.ops.aten
SIZES = (1, 31, 33, 1023, 50257)
# What the interpreter runs instead of the last of these, since it takes its time for each element: programs have the same texts
# there (test_reductions.py). From 4097 elements on, what a row is reduced to is computed in a loop; from some 6000 on it is cut
# into parts, a column from 8192 on, for which its length needs a divisor (17 here); from 16385 on, what is as long as a row is
# written in a loop.
PARTED, COLUMN, WRITTEN = 6817, 8857, 16411
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ROWS = 5
# The rows of the lowering table that the programs below have.
RULES = set(
    "sum mean amax amin max min argmax argmin var var_mean std std_mean norm linalg_vector_norm _softmax _log_softmax logsumexp "
    "_softmax_backward_data _log_softmax_backward_data nll_loss_forward nll_loss_backward native_layer_norm "
    "native_layer_norm_backward".split()
)
# What a kernel may be farther from float64 than eager is, in units of the dtype's epsilon and the largest result. Both round each
# result once, and eager may be exact by chance; with float64 itself, of which there is no better, eager is what is compared with,
# and a result below one counts as one.
EPSILONS = {torch.float64: 256.0}
OTHERWISE = 4.0


@dataclass(frozen=True)
class Case:
    """A program of tensors of `shapes(n)`, n being what it reduces. One that `rounds` has results of its operands' precision, if
    in a wider type."""

    name: str
    program: Callable[..., Any]
    shapes: Callable[[int], Sequence[tuple[int, ...]]]
    rounds: bool = False
    # The size that stands for 50257; None where 1023 has the same texts.
    large: int | None = PARTED


def _rows(n: int) -> list[tuple[int, ...]]:
    return [(ROWS, n)]


def _columns(n: int) -> list[tuple[int, ...]]:
    return [(n, ROWS)]


def _two(n: int) -> list[tuple[int, ...]]:
    return [(ROWS, n), (ROWS, n)]


def _norm(n: int) -> list[tuple[int, ...]]:
    return [(ROWS, n), (n,), (n,)]


def _norm_backward(n: int) -> list[tuple[int, ...]]:
    return [(ROWS, n), (ROWS, n), (n,), (n,)]


def _images(n: int) -> list[tuple[int, ...]]:
    return [(2, 6, 1, max(n, 8)), (2, 6, 1, max(n, 8)), (6,), (6,)]


def _layer_norm_backward(mask: list[bool]) -> Callable[..., Any]:
    def program(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> list[torch.Tensor]:
        _, mean, rstd = aten.native_layer_norm(x, [x.shape[-1]], weight, bias, 1e-5)
        found = aten.native_layer_norm_backward(grad, x, [x.shape[-1]], mean, rstd, weight, bias, mask)
        return [t for t, wanted in zip(found, mask, strict=True) if wanted]

    return program


def _softmax_backward(x: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    # What softmax gives lies between 0 and 1; of anything larger the terms of the sum would cancel.
    y = torch.sigmoid(x)
    return [
        aten._softmax_backward_data(grad, y, -1, x.dtype),
        aten._log_softmax_backward_data(grad, -y, -1, x.dtype),
    ]


def _cross_entropy(wide: bool, reduction: int = 1) -> Callable[..., Any]:
    """Loss and gradient, as autograd asks for them: of 16-bit numbers, or of what they are as float32."""

    def program(x: torch.Tensor) -> list[torch.Tensor]:
        x = x * 2
        y = x.float() if wide and x.dtype is not torch.float64 else x
        target = torch.arange(ROWS, device=x.device) * 7919 % x.shape[1]
        target = torch.where(target == 3, -100, target)
        log = aten._log_softmax(y, 1, False)
        read = log.float() if log.dtype in (torch.bfloat16, torch.float16) else log
        loss, weight = aten.nll_loss_forward(read, target, None, reduction, -100)
        grad = aten.nll_loss_backward(torch.ones_like(loss), read, target, None, reduction, -100, weight)
        grad = aten._log_softmax_backward_data(grad.to(log.dtype), log, 1, log.dtype)
        return [loss, grad.to(x.dtype)]

    return program


def _batch_norm(channels_last: bool) -> Callable[..., Any]:
    """Forward with running statistics, a rectifier, and the backward of both."""

    def program(x: torch.Tensor, grad: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> list[torch.Tensor]:
        if channels_last:
            x, grad = (t.to(memory_format=torch.channels_last) for t in (x, grad))
        numbers = torch.float64 if x.dtype is torch.float64 else torch.float32
        weight, bias, mean, var = (t.to(numbers) for t in (weight, bias, bias * 2, weight * weight + 1))
        y, *saved = aten.native_batch_norm(x, weight, bias, mean, var, True, 0.1, 1e-5)
        through = aten.threshold_backward(grad, y, 0)
        options = (mean, var, *saved, True, 1e-5, [True, True, True])
        return [y.relu(), *saved, mean, var, *aten.native_batch_norm_backward(through, x, weight, *options)]

    return program


CASES = [
    Case("sum", lambda x: [(x * 2).sum(1), x.sum(1, keepdim=True) + 1], _rows),
    Case("sum of columns", lambda x: [(x * 2).sum(0), x.sum(0, keepdim=True) * 3], _columns, large=COLUMN),
    Case("sum of all", lambda x: [(x + 1).sum()], _rows),
    Case("sum of two dimensions", lambda x: [x.view(ROWS, 1, -1, 1).sum((0, 2))], _rows),
    Case("sum in float32", lambda x: [x.sum(1, dtype=torch.float32)], _rows),
    Case("mean", lambda x: [x.mean(1, keepdim=True) * x, x.mean()], _rows),
    Case("mean of columns", lambda x: [x.mean(0)], _columns, large=COLUMN),
    Case("amax and amin", lambda x: [x.amax(1), x.amin(1, keepdim=True) - x], _rows),
    Case("amax of columns", lambda x: [x.amax(0), x.amin(0)], _columns, large=COLUMN),
    Case("max and min", lambda x: [*x.max(1), *x.min(1, keepdim=True)], _rows),
    Case("largest of all", lambda x: [(x * 2).max(), x.min()], _rows, large=None),
    Case("argmax and argmin", lambda x: [(x * 2).argmax(1), x.argmin(1, keepdim=True)], _rows),
    Case("argmax of columns", lambda x: [x.argmax(0)], _columns, large=None),
    Case("var and mean", lambda x: [*torch.var_mean(x + 3, 1), *torch.var_mean(x, 1, correction=0)], _rows),
    Case("std of columns", lambda x: [x.std(0, correction=0), *torch.std_mean(x, 0, correction=0)], _columns, large=COLUMN),
    Case("norm", lambda x: [torch.linalg.vector_norm(x, dim=1), x.norm()], _rows),
    Case("softmax", lambda x: [(x * 3).softmax(1)], _rows, large=WRITTEN),
    Case("softmax of columns", lambda x: [x.softmax(0) + 1], _columns, large=None),
    Case("log_softmax", lambda x: [x.log_softmax(1)], _rows, large=WRITTEN),
    Case("softmax backward", _softmax_backward, _two, large=WRITTEN),
    Case("logsumexp", lambda x: [x.logsumexp(1), (x * 2).logsumexp((0, 1), keepdim=True)], _rows, large=WRITTEN),
    Case("cross entropy", _cross_entropy(False), _rows, rounds=True, large=WRITTEN),
    Case("cross entropy in float32", _cross_entropy(True), _rows, large=WRITTEN),
    Case("cross entropy, summed", _cross_entropy(True, 2), _rows, large=WRITTEN),
    Case("layer norm", lambda x, w, b: [*aten.native_layer_norm(x, [x.shape[-1]], w, b, 1e-5)], _norm, large=WRITTEN),
    Case(
        "layer norm of a sum", lambda x, w, b: [F.layer_norm(x + x.abs(), (x.shape[-1],), w, None).relu()], _norm, large=WRITTEN
    ),
    Case("layer norm backward", _layer_norm_backward([True, False, False]), _norm_backward, large=COLUMN),
    Case("layer norm backward, all", _layer_norm_backward([True, True, True]), _norm_backward, large=COLUMN),
    Case("batch norm", _batch_norm(False), _images, large=3 * 1075),
    Case("batch norm in channels-last", _batch_norm(True), _images, large=39 * 129),
]


def draw(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [behind(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def layouts(dtype: torch.dtype) -> Iterator[tuple[str, Callable[..., Any], list[torch.Tensor]]]:
    """Operands that are transposed, cut out, stepped through, expanded, of several dimensions."""
    x, small = draw([(6, 40)], dtype)[0], draw([(4, 5, 6, 7)], dtype)[0]
    yield "transposed", lambda x: [x.t().sum(1), (x.t() * 2).softmax(0)], [x]
    yield "a part", lambda x: [x[1:4, 3:33].sum(1), x[2:, ::3].amax(1)], [x]
    yield "expanded", lambda x: [x[:, :1].expand(6, 40).sum(1), (x[:1].expand(6, 40) + 1).sum(0)], [x]
    yield "the middle", lambda x: [x.sum(2), x.mean((1, 3)), x.softmax(1)], [small]
    yield "outside and inside", lambda x: [x.sum((0, 3), keepdim=True), (x + 1).amax((0, 2))], [small]
    yield "channels last", lambda x: [x.sum((0, 2, 3)), x.mean((2, 3))], [small.to(memory_format=torch.channels_last)]
    yield "views of results", lambda x: [(x * 2).view(20, 42).sum(0), (x + 1).flatten(1).t().sum(0)], [small]
    yield "a row-level chain", lambda x: [(x - x.amax(1, keepdim=True)).exp().sum(1).log().mul(2)], [x]
    yield "two reductions in a row", lambda x: [((x - x.mean(1, keepdim=True)) ** 2).sum(1)], [x]
    yield "written in place", _in_place, [x]


def gathered(dtype: torch.dtype) -> Iterator[tuple[str, Callable[..., Any], list[torch.Tensor]]]:
    """Sums across rows beside reductions along them: of operands, of what is made of both, of several dimensions, in place."""
    grad, x, rest = draw([(200, 33)] * 3, dtype)
    weight, bias = draw([(33,)] * 2, dtype, 1)
    images = [t.reshape(4, 50, 33) for t in (grad, x, rest)]
    norm = _layer_norm_backward([True, True, True])

    def layer(grad: torch.Tensor, x: torch.Tensor, rest: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Any:
        found, *others = norm(grad.to(x.dtype), x, weight, bias)
        total = found + rest
        return [total, *others, total.to(grad.dtype).flatten(0, -2).sum(0).float()]

    def update(grad: torch.Tensor, x: torch.Tensor, rest: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Any:
        found, *others = norm(grad, x, weight, bias)
        return [(rest * 1).add_(found), *others, grad.sum(0, keepdim=True)]

    def softmax(grad: torch.Tensor, x: torch.Tensor) -> Any:
        found = aten._softmax_backward_data(grad, x.sigmoid(), -1, x.dtype)
        return [found * 2, found.sum(0), grad - grad.sum(0)]

    def dropped(grad: torch.Tensor, x: torch.Tensor, rest: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Any:
        found, *others = norm(grad * kept, x, weight, bias)
        total = found + rest
        return [total, *others, total.flatten(0, -2).sum(0)]

    # As many images as there are turns.
    (kept,) = draw([(8, 1, 1)], dtype)
    yield "whole images dropped", dropped, [*(t.reshape(8, 25, 33) for t in (grad, x, rest)), weight, bias]
    yield "layer norm, residual and bias", layer, [grad, x, rest, weight, bias]
    yield "the same of three dimensions", layer, [*images, weight, bias]
    yield "in place", update, [grad, x, rest, weight, bias]
    yield "softmax backward", softmax, [grad, x]


def _in_place(x: torch.Tensor) -> list[torch.Tensor]:
    y, total = x * 1, x[:, 0] * 1
    y.sub_(y.sum(1, keepdim=True)).mul_(0.5)
    total.add_(y.sum(1))
    return [y, total]


def special(dtype: torch.dtype, n: int) -> torch.Tensor:
    """Rows with a NaN, infinities of either sign, nothing but minus infinity, nothing but zeros of both signs."""
    x = draw([(8, n)], dtype)[0]
    at = n // 2
    x[0, at], x[1, at], x[2, at] = float("nan"), float("inf"), float("-inf")
    x[3, at], x[3, 0] = float("inf"), float("-inf")
    x[4], x[5], x[6] = float("-inf"), -0.0, 0.0
    x[6, at], x[7, at], x[7, -1] = -0.0, float("nan"), float("inf")
    return x


def numbers_of_special(x: torch.Tensor) -> list[torch.Tensor]:
    """Of rows that are in loops from 4097 elements on, for nothing as long as they is written."""
    found = [x.sum(1), x.mean(1), x.amax(1), x.amin(1), x.argmax(1), x.argmin(1), *x.max(1), x.var(1)]
    return [*found, x.logsumexp(1), torch.linalg.vector_norm(x, dim=1)]


def rows_of_special(x: torch.Tensor) -> list[torch.Tensor]:
    """Of rows that are in loops from 16385 elements on."""
    return [x.softmax(1), x.log_softmax(1), F.layer_norm(x, (x.shape[1],))]


def of_special(x: torch.Tensor) -> list[torch.Tensor]:
    return [*numbers_of_special(x), *rows_of_special(x)]


def tensors(result: Any) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


def exactly(program: Callable[..., Any], inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The program in float64."""
    return tensors(program(*(x.double() if x.dtype.is_floating_point else x for x in inputs)))


def differs(got: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor, precision: torch.dtype | None = None) -> str | None:
    """How a result differs from eager's by more than it may; None if it does not. `precision` is that of coarser steps."""
    if got.dtype != eager.dtype or got.shape != eager.shape:
        return f"{got.dtype}{tuple(got.shape)} instead of {eager.dtype}{tuple(eager.shape)}"
    if not got.dtype.is_floating_point:
        return None if torch.equal(got, eager) else f"{int((got != eager).sum())} positions"
    if not torch.equal(got.isnan(), eager.isnan()) or not torch.equal(got.isinf(), eager.isinf()):
        return "NaN or infinity elsewhere"
    dtype, finite = precision or got.dtype, eager.isfinite() & exact.isfinite()
    got, eager, exact = (t[finite].double() for t in (got, eager, exact))
    if not got.numel():
        return None
    off, allowed = float((got - exact).abs().max()), float((eager - exact).abs().max())
    largest = max(float(exact.abs().max()), 1.0 if dtype is torch.float64 else 0.0)
    allowed += EPSILONS.get(dtype, OTHERWISE) * torch.finfo(dtype).eps * largest
    return None if off <= allowed else f"off by {off:.3g}, of which {allowed:.3g} would do"
