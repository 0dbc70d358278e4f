"""Run in a process of its own, for Triton's interpreter must be chosen before Triton is imported: prints a line per difference.

Usage: python -m tests.codegen.interpret <folder for sources> <shapes | ops>
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch

from kitsune.codegen import Compiler, render, why_not_lowered
from kitsune.ir.plan import Launch
from kitsune.runtime.kernel_launch import PreparedLaunch
from tests.codegen.build import Built, build
from tests.codegen.known import is_known
from tests.codegen.memory_check import watch
from tests.codegen.samples import SAMPLES, Sample, draw

# The CPU's fused SGD handles `maximize` and 16-bit types otherwise than the GPU's.
OTHER_ON_CPU = {"_fused_sgd_"}
# In float64, which tells other branches and constants apart than narrower types do: the first is at its threshold.
WIDE = [
    Sample("softplus_backward", lambda g, x: torch.ops.aten.softplus_backward(g, x * 0 + 20, 1, 20), 2, (torch.float64,)),
    Sample("mse_loss_backward", lambda x, y, g: torch.ops.aten.mse_loss_backward(x, y, g, 1), 3, (torch.float64,)),
]
# Where formulas have another branch: thresholds, bounds, zeros.
EDGES = (-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0, 20.0)
Tensors = list[torch.Tensor]


def run(
    built: Built,
    compiler: Compiler,
    inputs: list[torch.Tensor],
    fresh: list[torch.Tensor],
    batched: bool,
    table: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """What the kernel writes. With a `table`, it finds moving numbers there."""
    kernel = built.kernel
    outputs = [torch.full_like(t, 1) for t in built.written]
    before = {id(t): f for t, f in zip(inputs, fresh, strict=True)}
    tensors = [*(before.get(id(t), t) for t in built.read), *outputs]
    accesses = (*kernel.loads, *(s.access for s in kernel.stores))
    where = {id(a): t.data_ptr() for a, t in zip(accesses, tensors, strict=True)}
    moves = table is not None
    launch = PreparedLaunch(Launch((kernel,)), render(kernel, batched, moves), compiler, slots_in_memory=moves)
    launch = launch if table is None else launch.captured_with(table.data_ptr())
    launch.start(lambda access: where[id(access)], built.slots if table is None else [], 0)
    return outputs


def differs_in_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        not torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)) if a.dim() else a.item() != b.item()
    )


def differs(got: torch.Tensor, expected: torch.Tensor) -> str | None:
    """Rounding is compared on GPUs; here a library function stands in for another, and the CPU rounds steps elsewhere."""
    if got.dtype != expected.dtype or got.shape != expected.shape:
        return f"{got.dtype}{tuple(got.shape)} instead of {expected.dtype}{tuple(expected.shape)}"
    if not got.dtype.is_floating_point:
        return None if torch.equal(got, expected) else f"{int((got != expected).sum())} elements"
    eps = 8 * torch.finfo(got.dtype).eps
    if torch.allclose(got, expected, rtol=eps, atol=eps, equal_nan=True):
        return None
    return f"by up to {(got.double() - expected.double()).abs().max().item():.3g}"


def compare(
    name: str, call: Callable[..., Any], inputs: list[Any], compiler: Compiler, moving: Any = (), batched: bool = False
) -> None:
    fresh = [t.clone() if t.is_contiguous() else t for t in inputs]
    expected = call(*(t.clone() if t.is_contiguous() else t for t in inputs))
    built = build(call, inputs, "kernel", moving)
    if reasons := [reason for op in built.ops if (reason := why_not_lowered(op))]:
        print(f"{name}: {reasons[0]}")
        return
    forms = (False, True) if built.slots and not batched else (False,)
    known = [is_known(Launch((built.kernel,)), render(built.kernel, batched, moves)) for moves in forms]
    if all(known):
        return
    got = run(built, compiler, inputs, [t.clone() for t in fresh] if built.slots else fresh, batched)
    if built.slots and not batched:
        from_memory = run(built, compiler, inputs, fresh, batched, torch.tensor(built.slots, dtype=torch.float64))
        if any(differs_in_bits(a, b) for a, b in zip(got, from_memory, strict=True)):
            print(f"{name}: numbers from memory give other bits than numbers by value")
    for a, b in zip(got, [expected] if isinstance(expected, torch.Tensor) else expected, strict=True):
        if difference := differs(a, b):
            print(f"{name}: {difference}")


def ops(compiler: Compiler) -> None:
    for i, sample in enumerate([*SAMPLES, *WIDE]):
        for dtype in sample.dtypes if sample.rule not in OTHER_ON_CPU else ():
            inputs = with_edges(sample, draw(sample, dtype, (3, 21)))
            if supported(sample, inputs):
                compare(f"{i} {sample.rule} {dtype}", sample.call, inputs, compiler, sample.moving)


def with_edges(sample: Sample, inputs: Tensors) -> Tensors:
    """With some numbers for which formulas have branches, at other places in each operand."""
    if sample.like == "any" and inputs[0].is_floating_point():
        for k, tensor in enumerate(inputs):
            tensor.view(-1)[: len(EDGES)] = torch.tensor(EDGES, dtype=tensor.dtype).roll(k)
    if sample.rule == "log_sigmoid_backward":  # what the CPU's forward keeps for it
        inputs[2] = inputs[1].abs().neg().exp()
    return inputs


def supported(sample: Sample, inputs: list[torch.Tensor]) -> bool:
    try:
        sample.call(*(t.clone() for t in inputs))
    except (RuntimeError, NotImplementedError):
        return False
    return True


def layouts(dtype: torch.dtype) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """Pairs of tensors of every kind of geometry."""

    def new(*shape: int) -> torch.Tensor:
        return draw(SAMPLES[0], dtype, shape)[0]

    for shape in ((), (0,), (1,), (63,), (5, 7), (3, 1, 4), (2, 3, 0)):
        yield f"{shape}", [new(*shape), new(*shape)]
    yield "transposed", [new(5, 7), new(7, 5).t()]
    yield "both transposed", [new(7, 5).t(), new(7, 5).t()]
    yield "strided", [new(6, 20)[:, ::2], new(6, 10)]
    yield "sliced", [new(9, 33)[1:6, 2:9], new(5, 7)]
    yield "expanded", [new(5, 1).expand(5, 7), new(7)]
    yield "broadcast in 3-D", [new(4, 1, 6), new(5, 1)]
    yield "one number", [new(1500), new()]
    yield "channels last", [new(2, 3, 4, 5).to(memory_format=torch.channels_last), new(3, 1, 1)]


def unrounded(compiler: Compiler) -> None:
    """A kernel that rounds what it stores, and before that only what is compared."""
    for dtype in (torch.bfloat16, torch.float16):
        x, y = draw(SAMPLES[0], dtype, (9, 33))[0], draw(SAMPLES[0], dtype, (9, 33), seed=1)[0]
        wide = [t.float() for t in (x, y)]
        # The threshold lies between most products and what they are rounded to.
        limit = float((x * y)[0, 0])
        built = build(lambda x, y: (p := x * y, [(p + 1.5) * y, p >= limit])[1], [x, y], "kernel")  # noqa: B023
        got = run(replace(built, kernel=replace(built.kernel, rounds=False)), compiler, [x, y], [x, y], False)
        product = wide[0] * wide[1]
        once = ((product + 1.5) * wide[1]).to(dtype)
        if not torch.equal(got[0], once) or torch.equal(once, (x * y + 1.5) * y):
            print(f"unrounded {dtype}: {int((got[0] != once).sum())} elements are not rounded once")
        if not torch.equal(got[1], x * y >= limit):
            print(f"unrounded {dtype}: {int((got[1] != (x * y >= limit)).sum())} comparisons are not eager's")


def shapes(compiler: Compiler) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool):
        for name, inputs in layouts(dtype):
            chain = (lambda x, y: (x | y) & x) if dtype is torch.bool else (lambda x, y: (x + y) * x)
            compare(f"{name} {dtype}", chain, inputs, compiler)
    x = torch.randn(1500)
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        compare(f"batched {dtype}", lambda x, y: x * y + 0.5, [x.to(dtype), x.to(dtype)], compiler, (0.5,), batched=True)
        grid = draw(SAMPLES[0], dtype, (33, 9, 16))[0]
        strided = [grid, grid.permute(2, 1, 0).contiguous().permute(2, 1, 0)]
        compare(f"batched, strided {dtype}", lambda x, y: x + y * y, strided, compiler, batched=True)
    unrounded(compiler)


if __name__ == "__main__":
    check = watch()
    {"ops": ops, "shapes": shapes}[sys.argv[2]](Compiler(sys.argv[1], interpret=True))
    print("".join(f"{told}\n" for told in check.found), end="")
