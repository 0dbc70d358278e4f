"""Regions whose inside has other layouts than eager's leave what eager leaves, in eager's layout."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings, strategies as st

from kitsune.ir import Graph
from kitsune.planning import Planner
from kitsune.scheduler import dead_code, in_channels_last, joined_in_place, padded_products, patches_as_rows
from kitsune.scheduler.formats import is_channels_last
from tests.plan.test_channels_last import Block, Sides, step
from tests.plan.test_joining import COSTS as ONLY_BYTES, X, Y, gradients, kernels
from tests.plan.test_padding import COSTS, vocabulary
from tests.plan.test_patches import stem
from tests.property.test_programs import SLOW
from tests.runtime.checked import record
from tests.runtime.in_double import assert_as_good, in_double, replayed, run_by_plan
from tests.runtime.test_plan_executor import Broken
from tests.runtime.test_real_plans import Walk

Program = Callable[..., Any]


def assert_as_eager(program: Program, rewrite: Callable[[Graph], Graph]) -> Graph:
    """Op by op, by kernels, and with kernels that fail; returns the graph that was run.

    Reductions are left to the library, since kernels only walk here: those with reductions are interpreted elsewhere.
    """
    graph, values, scalars = record(program, warmup=1)
    exact, eager = in_double(graph, values, scalars), replayed(graph, values, scalars)
    other = rewrite(dead_code(graph))
    assert_as_good(graph, exact, eager, replayed(other, values, scalars))
    plan = Planner(COSTS, verify=True, numerics="bitwise").plan(graph)
    for start in (Walk, Broken):
        assert_as_good(graph, exact, eager, run_by_plan(plan, values, scalars, start))
    return other


def padding(graph: Graph) -> Graph:
    return padded_products(graph, COSTS, lambda op: None)


def layer(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, grad: torch.Tensor) -> list[torch.Tensor]:
    """A linear layer, a function after it, and its gradients, at whatever sizes."""
    y = torch.nn.functional.linear(x, w, b)
    grad = grad * (y > 0)
    return [y.float().relu().sum(1), grad @ w, (grad.t() @ x).float(), grad.sum(0)]


# What is held of an operand: its memory is the recorded one then, and not the larger one, which others get when it is over.
KEPT: dict[str, Program] = {
    "nothing": lambda weight: None,
    "all": lambda weight: weight,
    "turned": lambda weight: weight.t(),
    "a row": lambda weight: weight[0],
    "all and a row": lambda weight: (weight, weight[0]),
}


@settings(SLOW, max_examples=60)
@given(
    sizes=st.tuples(*[st.sampled_from((1, 3, 8, 9, 16, 33))] * 3),
    dtype=st.sampled_from((torch.bfloat16, torch.float16)),
    bias=st.booleans(),
    keep=st.sampled_from(sorted(KEPT)),
    seed=st.integers(0, 9),
)
@example(sizes=(33, 9, 33), dtype=torch.bfloat16, bias=False, keep="turned", seed=0)
def test_layers_of_any_size(sizes: tuple[int, int, int], dtype: torch.dtype, bias: bool, keep: str, seed: int) -> None:
    m, n, k = sizes
    generator = torch.Generator().manual_seed(seed)
    x, w, b, grad = (torch.randn(*shape, generator=generator) for shape in ((m, k), (n, k), (n,), (m, n)))

    def program() -> Any:
        half = [t.to(dtype) for t in (x, w, b, grad)]
        found = layer(half[0], half[1], half[2] if bias else None, half[3])
        return found, KEPT[keep](half[1])

    other = assert_as_eager(program, padding)
    assert any(op.allocates for op in other.ops) or all(size % 8 == 0 or size == 1 for size in sizes[1:])


def images(graph: Graph) -> Graph:
    return in_channels_last(graph, COSTS)


class Ways(Block):
    """Results that somebody keeps, writes in place, parts of images, and a dropout between convolutions."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = y = F.dropout(self.first(x), 0.3)
        y[:, :4].mul_(2)
        y = F.avg_pool2d(self.norm(y), 2).add_(1)
        z = self.second(y.permute(0, 1, 3, 2)).transpose(2, 3)
        pooled = F.adaptive_avg_pool2d(F.gelu(self.third(y + z)), 2)
        return self.linear(torch.cat([pooled.flatten(1), y.sum((0, 2, 3)).expand(4, -1)], 1))


MODELS = [Block, lambda: Block(lambda x: x.flatten(1)), lambda: Block(lambda x: F.softmax(x, 1).amax((2, 3))), Ways, Sides]


@pytest.mark.parametrize("make", MODELS, ids=["mean", "flat", "softmax", "ways", "sides"])
@pytest.mark.parametrize("size", [2, 8, 9])
def test_convolutions(make: Callable[[], Any], size: int) -> None:
    # Statistics of ever so few elements would amplify the last bit.
    other = assert_as_eager(step(make(), 4, 3, size, size), images)
    assert any(is_channels_last(op.results[0].type) for op in other.ops if op.target._opname == "convolution") or size == 2


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_patches(bias: bool, last: bool) -> None:
    other = assert_as_eager(stem(bias, last), lambda graph: patches_as_rows(graph, COSTS))
    assert not any(op.target._opname.startswith("convolution") for op in other.ops)


IMAGE, KERNEL = torch.linspace(-1, 1, 2 * 8 * 36).sin().view(2, 8, 6, 6), torch.linspace(-2, 2, 576).cos().view(8, 8, 3, 3)


def written_between() -> Any:
    """A copy in another layout is out of date once a part of what it is a copy of has been written."""
    image, kernel = IMAGE.to(torch.bfloat16), KERNEL.to(torch.bfloat16)
    first = F.conv2d(image, kernel)
    image[:, :2].mul_(3)
    second = F.conv2d(image, kernel)
    before = second.cumsum(1)
    second[:, 1:].mul_(2)
    return first.float(), second.float() + 1, before, second.cumsum(1)


def views_of_parts() -> Any:
    """Several views come from one call, and the library wants them as they were."""
    image = F.conv2d(IMAGE.to(torch.bfloat16), KERNEL.to(torch.bfloat16))
    first, second = image.split(4, 1)
    return second.cumsum(1), first.flip(1).float(), image.flatten(1).cumsum(1)


def test_several_views_are_made_again_of_a_copy() -> None:
    other = assert_as_eager(views_of_parts, images)
    assert is_channels_last(next(op for op in other.ops if op.target._opname == "convolution").results[0].type)


def written_through_a_view() -> Any:
    image = F.conv2d(IMAGE.to(torch.bfloat16), KERNEL.to(torch.bfloat16))
    image.flatten(1)[:, ::3].mul_(2)
    return image.float() + 1


def test_an_image_that_is_written_through_a_view_of_the_recorded_layout_keeps_it() -> None:
    other = assert_as_eager(written_through_a_view, images)
    assert other.ops and not any(op.target._opname == "clone" for op in other.ops)


def seen_by_place() -> Any:
    """What lies in certain places of a memory, an activation's and a part of it."""
    image = F.conv2d(IMAGE.to(torch.bfloat16), KERNEL.to(torch.bfloat16))
    return image.as_strided((2, 64), (128, 1)).cumsum(1), image[1:].as_strided((8,), (16,), 3).float()


def test_elements_at_certain_places_are_those_of_the_recorded_layout() -> None:
    other = assert_as_eager(seen_by_place, images)
    assert is_channels_last(next(op for op in other.ops if op.target._opname == "convolution").results[0].type)


def test_a_matrix_elsewhere_in_an_operands_memory_is_not_the_operand() -> None:
    memory = torch.linspace(-1, 1, 40 * 33).sin().to(torch.bfloat16)
    weight, whole = (memory[n : n + 33 * 16].view(33, 16).clone().requires_grad_() for n in (0, 7))
    weight.data, states = memory[8 : 8 + 33 * 16].view(33, 16), torch.ones(24, 16).to(torch.bfloat16)

    def program() -> Any:
        matrix = weight.as_strided((16, 33), (1, 16), 0).detach()
        return states @ matrix, states @ whole.detach().t()

    assert_same_bits(program, 1)


def test_what_is_elsewhere_in_an_operands_memory_is_read_there() -> None:
    memory = torch.linspace(-1, 1, 40 * 33).sin().to(torch.bfloat16)
    weight = torch.nn.Parameter(memory[8 : 8 + 33 * 16].view(33, 16))

    def program() -> Any:
        with torch.no_grad():
            return torch.ones(24, 33).to(torch.bfloat16) @ weight, weight.as_strided((20,), (1,), 0).float()

    assert_same_bits(program, 2)


def assert_same_bits(program: Program, n_larger: int) -> None:
    """Although matrices of its products, so many of them, are made larger."""
    graph, values, scalars = record(program, warmup=1)
    other = padding(dead_code(graph))
    assert sum(op.allocates for op in other.ops) == n_larger
    eager, found = (replayed(of, values, scalars) for of in (graph, other))
    assert all(torch.equal(found[v.id], eager[v.id]) for v in graph.outputs)


def test_a_copy_is_not_read_once_it_is_out_of_date() -> None:
    other = assert_as_eager(written_between, images)
    assert sum(op.target._opname == "clone" for op in other.ops) >= 5


def weights_written_between() -> Any:
    """As an optimizer writes them, between the steps that one region has: they are parameters in float32, copied for each."""
    found = [F.conv2d(IMAGE, WEIGHT)]
    for _ in range(2):
        WEIGHT.mul_(0.5)
        WEIGHT[:, 1:3].add_(1)
        found.append(F.conv2d(IMAGE, WEIGHT))
    return found


WEIGHT = KERNEL.clone()


def test_a_copy_of_a_weight_is_not_read_once_it_is_out_of_date() -> None:
    other = assert_as_eager(weights_written_between, images)
    weights = [op.args[1] for op in other.ops if op.target._opname == "convolution"]
    assert len({v.id for v in weights}) == 3 and all(is_channels_last(v.type) for v in weights)


def joining(graph: Graph) -> Graph:
    return joined_in_place(graph, ONLY_BYTES, lambda op: None)


def twice() -> Any:
    """One part is joined twice, along the last dimension; another one has no place in between that is left empty."""
    y = X[:, 0] * 3
    return torch.cat([y, y, Y.cumsum(2)[:, 1], X[:, 1] + 1], -1).cumsum(1) + 1


@pytest.mark.parametrize("program", [gradients, kernels, twice], ids=lambda p: p.__name__)
def test_joined_tensors_have_the_bits_of_eager(program: Program) -> None:
    graph, values, scalars = record(program, warmup=1)
    other = joining(dead_code(graph))
    assert any(op.allocates for op in other.ops)
    eager, plan = replayed(graph, values, scalars), Planner(ONLY_BYTES, verify=True, numerics="bitwise").plan(graph)
    for found in (replayed(other, values, scalars), *(run_by_plan(plan, values, scalars, start) for start in (Walk, Broken))):
        assert all(torch.equal(found[v.id], eager[v.id]) for v in graph.outputs)


def test_kernels_with_reductions_walk_over_other_layouts(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-W", "ignore", "-m", "tests.codegen.interpret_layouts", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 20, done.stdout


@pytest.mark.parametrize("program", [vocabulary])
def test_programs(program: Program) -> None:
    assert any(op.allocates for op in assert_as_eager(program, padding).ops)
