"""Random programs on images and matrices of small whole numbers, of which every sum is exact in any order: bits are compared."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from kitsune.ir import Graph, verify
from kitsune.planning import Planner
from kitsune.scheduler import dead_code, in_channels_last, joined_in_place, padded_products
from kitsune.scheduler.formats import is_channels_last
from tests.plan.test_joining import COSTS as ONLY_BYTES
from tests.plan.test_padding import COSTS
from tests.property.test_programs import SLOW
from tests.runtime.checked import record
from tests.runtime.in_double import replayed, run_by_plan
from tests.runtime.test_plan_executor import Broken
from tests.runtime.test_real_plans import Walk

Images = list[torch.Tensor]
N, C, SIZE = 2, 8, 5
WHOLE = torch.Generator().manual_seed(0)
START = torch.randint(-1, 2, (3, N, C, SIZE, SIZE), generator=WHOLE).float()
KERNELS = [torch.randint(-1, 2, (C, C, k, k), generator=WHOLE).float() for k in (1, 3)]
MATRIX = torch.randint(-1, 2, (C * SIZE, 9), generator=WHOLE).float()


def small(x: torch.Tensor) -> torch.Tensor:
    """Back into the range in which sums are exact."""
    return x.clamp(-1, 1)


def written(x: torch.Tensor, part: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    part(x).mul_(-1)
    return x


def product(x: torch.Tensor) -> torch.Tensor:
    """An odd dimension, there and back."""
    wide = small(x.reshape(N * SIZE, C * SIZE) @ MATRIX.to(x.dtype))
    return small(wide @ MATRIX.to(x.dtype).t()).view(N, C, SIZE, SIZE)


def product_of_rows(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Of the images themselves, and not of new ones: who holds a view of them finds them in eager's memory."""
    return small(x.reshape(N * C * SIZE, SIZE) @ y.reshape(N * C * SIZE, SIZE).t()).amax(1).view(N, C, SIZE, 1).expand_as(x) * x


# What can be done with two images: the result is another one.
STEPS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "point": lambda x, y: small(F.conv2d(x, KERNELS[0].to(x.dtype))),
    "convolution": lambda x, y: small(F.conv2d(x, KERNELS[1].to(x.dtype), padding=1)),
    "pool": lambda x, y: F.max_pool2d(x, 3, 1, 1),
    "relu": lambda x, y: F.relu(x),
    "relu_": lambda x, y: F.relu_(x),
    "add": lambda x, y: small(x + y),
    # Of a view of the same memory that lies otherwise eager refuses to take it.
    "add_": lambda x, y: x.add_(y * 1).clamp_(-1, 1),
    "channel": lambda x, y: small(x * y.amax((2, 3), keepdim=True)),
    "turned": lambda x, y: small(x + y.transpose(2, 3)),
    "cumsum": lambda x, y: small(x.cumsum(1)),
    "flat": lambda x, y: small(x.flatten(1).cumsum(1)).view_as(x),
    "split": lambda x, y: torch.cat([*reversed(x.split(3, 1))], 1),
    "stacked": lambda x, y: torch.stack([x, y], 1).permute(0, 2, 3, 4, 1).contiguous()[..., 1],
    "joined": lambda x, y: small(torch.cat([x * -1, y + 0], 3).unfold(3, SIZE, SIZE).sum(3)),
    "written": lambda x, y: written(x, lambda x: x[:, 2:5]),
    "written through a view": lambda x, y: written(x, lambda x: x.flatten(1)[:, 1::3]),
    "product": lambda x, y: product(x),
    "product of rows": lambda x, y: product_of_rows(x, y),
    "detached": lambda x, y: x.detach(),
    "a view": lambda x, y: x.transpose(2, 3),
    "two views": lambda x, y: x.reshape(N, -1).view(N, C, SIZE, SIZE),
}


def program(steps: list[tuple[str, int, int]], keep: int, dtype: torch.dtype) -> Callable[[], Any]:
    """In float32 the images come in as they are, to be written, and so do the kernels; in 16 bits all are cast."""
    start = [image.clone() for image in START]

    def run() -> Any:
        images: Images = [image.to(dtype) for image in start]
        for name, a, b in steps:
            images.append(STEPS[name](images[a % len(images)], images[b % len(images)]))
        return [image for k, image in enumerate(images) if keep >> k & 1], images[-1].float().sum((2, 3)), images[-1].float()

    return run


PASSES: list[Callable[[Graph], Graph]] = [
    lambda graph: in_channels_last(graph, COSTS),
    lambda graph: joined_in_place(graph, ONLY_BYTES, lambda op: None),
    lambda graph: padded_products(graph, COSTS, lambda op: None),
]
# Steps with one gradient, which is exact.
BETWEEN = ["relu", "relu_", "pool", "turned", "flat", "split", "written"]
calls = st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 9), st.integers(0, 9))


@settings(SLOW, max_examples=80)
@given(
    steps=st.lists(calls, min_size=1, max_size=8),
    keep=st.integers(0, 2**8 - 1),
    dtype=st.sampled_from((torch.bfloat16, torch.float32)),
)
def test_random_programs_have_the_bits_of_eager(steps: list[tuple[str, int, int]], keep: int, dtype: torch.dtype) -> None:
    with torch.no_grad():
        graph, values, scalars = record(program(steps, keep, dtype), warmup=1)
    assert_same_bits(graph, values, scalars)


def assert_same_bits(graph: Graph, values: list[Any], scalars: list[float]) -> Graph:
    """After each pass and by the whole plan; returns the graph after the passes."""
    eager, other = replayed(graph, values, scalars), dead_code(graph)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a result in other strides than the pass expected is copied with a warning
        found = []
        for rewrite in PASSES:
            other = rewrite(other)
            verify(other)
            found.append(replayed(other, values, scalars))
        plan = Planner(COSTS, verify=True).plan(graph)
        found += [run_by_plan(plan, values, scalars, start) for start in (Walk, Broken)]
    for got in found:
        for value in graph.outputs:
            assert got[value.id].stride() == eager[value.id].stride() and torch.equal(got[value.id], eager[value.id])
    return other


@settings(SLOW, max_examples=20)
@given(sizes=st.tuples(st.sampled_from((1, 3)), st.sampled_from((1, 3))), bias=st.booleans(), between=st.sampled_from(BETWEEN))
def test_updates_of_float32_parameters_have_the_bits_of_eager(sizes: tuple[int, int], bias: bool, between: str) -> None:
    """Two steps in one region: what the second one reads are not the copies of the weights that the first one has made."""
    weights = [torch.randint(-1, 2, (C, C, k, k), generator=WHOLE).float().requires_grad_() for k in sizes]
    shift = torch.ones(C, requires_grad=True) if bias else None

    def run() -> Any:
        left: list[Any] = []
        for k in range(2):
            middle = STEPS[between](F.conv2d(START[k], weights[0], shift, padding="same"), START[2])
            out = F.conv2d(middle, weights[1], padding="same")
            grads = torch.autograd.grad(out, weights, START[2])
            with torch.no_grad():
                for weight, grad in zip(weights, grads, strict=True):
                    weight.detach().sub_(grad.sign())  # Not as an update, behind which a region ends.
            left += [out.detach(), *grads]
        return left

    other = assert_same_bits(*record(run, warmup=1))
    convolutions = [op for op in other.ops if op.target._opname.startswith("convolution")]
    assert len(convolutions) == 8 and all(is_channels_last(op.args[0].type) for op in convolutions)


@pytest.mark.parametrize("name", sorted(STEPS))
def test_each_step_is_exact(name: str) -> None:
    half, wide = [START.to(dtype) for dtype in (torch.bfloat16, torch.float64)]
    assert torch.equal(STEPS[name](half[0].clone(), half[1]).double(), STEPS[name](wide[0].clone(), wide[1]))
