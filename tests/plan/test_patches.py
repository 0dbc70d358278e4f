"""Convolutions of patches become matrix products where it pays; gradients of biases of convolutions are sums of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import kitsune
from kitsune.ir import Graph, Kind, verify
from kitsune.scheduler import RATES, Costs, dead_code, patches_as_rows
from tests.plan.recorded import launched, plan_of, recorded_again
from tests.plan.test_padding import COSTS

aten = torch.ops.aten
HALF = torch.bfloat16
IMAGE = torch.linspace(-1, 1, 2 * 3 * 96).sin().view(2, 3, 8, 12)
FILTERS = torch.linspace(-2, 2, 8 * 3 * 16).cos().view(8, 3, 4, 4)
GRAD = torch.linspace(-1, 3, 2 * 8 * 6).sin().view(2, 8, 2, 3)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    kitsune.reset()
    yield


def stem(bias: bool = True, last: bool = False) -> Callable[[], Any]:
    """The beginning of a vision transformer: patches, a class token, and the gradients of filters and bias."""

    def program() -> Any:
        x, w = IMAGE.to(HALF), FILTERS.to(HALF)
        b = FILTERS[:, 0, 0, 0].to(HALF) if bias else None
        y = aten.convolution(x, w, b, (4, 4), (0, 0), (1, 1), False, (0, 0), 1).flatten(2).transpose(1, 2)
        y = torch.cat([torch.ones(2, 1, 8), y], 1) + 1
        grad = GRAD.to(HALF).to(memory_format=torch.channels_last if last else torch.contiguous_format)
        sizes = [8] if bias else None
        options = (w, sizes, (4, 4), (0, 0), (1, 1), False, (0, 0), 1, (False, True, bias))
        _, to_weight, to_bias = aten.convolution_backward(grad * 2, x, *options)
        return y * 2, to_weight.float(), None if to_bias is None else to_bias.float()

    return program


def rewritten(program: Callable[[], Any], costs: Costs = COSTS) -> Graph:
    graph = patches_as_rows(dead_code(recorded_again(program)), costs)
    verify(graph)
    return graph


def names(graph: Graph) -> list[str]:
    return [op.target._opname for op in graph.ops if op.kind is not Kind.VIEW]


@pytest.mark.parametrize("bias", [False, True])
def test_the_image_is_written_in_patches_once_for_both_products(bias: bool) -> None:
    found = names(rewritten(stem(bias)))
    assert found.count("clone") == 2  # the image, and the gradient, which lies otherwise
    assert not {"convolution", "convolution_backward"} & set(found)
    assert found.count("mm") + found.count("addmm") == 2 and found.count("sum") == bias


def test_a_gradient_that_lies_in_rows_is_not_copied() -> None:
    assert names(rewritten(stem(last=True))).count("clone") == 1


def test_what_is_joined_reads_the_product_itself() -> None:
    graph = rewritten(stem())
    (joined,) = [op for op in graph.ops if op.target is aten.cat.default]
    assert joined.inputs[-1].type.stride == (6 * 8, 8, 1)


def refused(**changes: Any) -> Callable[[], Any]:
    options = {"image": IMAGE.to(HALF), "stride": (4, 4), "padding": (0, 0), "groups": 1, "filters": FILTERS} | changes

    def program() -> Any:
        w = options["filters"].to(options["image"].dtype)
        sizes = (options["stride"], options["padding"], (1, 1), False, (0, 0), options["groups"])
        return aten.convolution(options["image"] * 1, w, None, *sizes).float()

    return program


@pytest.mark.parametrize(
    "changes",
    [
        {"image": IMAGE},
        {"stride": (2, 2)},
        {"padding": (2, 0)},
        {"image": IMAGE[:, :, :7].to(HALF)},
        {"image": IMAGE.expand(2, 3, 8, 12).repeat(1, 3, 1, 1)[:, :8].to(HALF), "filters": FILTERS.repeat(1, 3, 1, 1)[:, :8]},
    ],
    ids=["float32", "overlapping", "padded", "left over", "channels in vectors"],
)
def test_other_convolutions_stay_with_the_library(changes: dict[str, Any]) -> None:
    assert "convolution" in names(rewritten(refused(**changes)))
    assert "convolution" not in names(rewritten(refused()))


def test_a_small_convolution_stays_with_the_library() -> None:
    assert "convolution" in names(rewritten(stem(), Costs(RATES["sm_90"])))


def test_a_result_that_others_see_keeps_its_layout() -> None:
    def seen() -> Any:
        return aten.convolution(IMAGE.to(HALF), FILTERS.to(HALF), None, (4, 4), (0, 0), (1, 1), False, (0, 0), 1)

    assert "convolution" in names(rewritten(seen))


def bias_gradient() -> Any:
    x, w, grad = IMAGE * 1, FILTERS * 1, F.relu(GRAD - 1)
    return aten.convolution_backward(grad, x, w, [8], (4, 4), (0, 0), (1, 1), False, (0, 0), 1, (True, True, True))


def test_the_gradient_of_a_bias_joins_what_makes_its_terms() -> None:
    strict, plain = plan_of(bias_gradient, numerics="strict"), plan_of(bias_gradient)
    assert any(name.endswith("_sum") for name in launched(strict)) and not any("sum" in name for name in launched(plain))
    (left,) = [launch.op for launch in strict.launches if launch.name == "convolution_backward"]
    assert left.args[-1] == (True, True, False) and len(left.results) == 2


def test_nothing_is_left_of_a_backward_that_was_for_the_bias_alone() -> None:
    def program() -> Any:
        return aten.convolution_backward(
            F.relu(GRAD), IMAGE * 1, FILTERS * 1, [8], (4, 4), (0, 0), (1, 1), False, (0, 0), 1, (False, False, True)
        )[2]

    assert "convolution_backward" not in launched(plan_of(program, numerics="strict"))
