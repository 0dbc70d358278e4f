"""Convolutions in 16 bits, and what lies between them, in channels-last, where it pays."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kitsune
from kitsune.ir import Graph, Kind, Op, Result, TensorType, Value, default_type, type_of, verify
from kitsune.planning import Planner
from kitsune.scheduler import RATES, Costs, dead_code, in_channels_last
from kitsune.scheduler.channels_last import _over_images, _pointwise
from kitsune.scheduler.formats import ROWS, elementwise, is_channels_last, why_not_channels_last
from tests.plan.recorded import launched, recorded_again
from tests.plan.test_padding import COSTS, Generous

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    kitsune.reset()
    yield


class ImagesOnly(Generous):
    """Products stay as they are."""

    __slots__ = ()

    def worth_padding(self, op: Op) -> bool:
        return False


class Block(nn.Module):
    """Convolutions, a norm, pooling, a sum of two ways and a linear layer."""

    def __init__(self, last: Callable[[torch.Tensor], torch.Tensor] = lambda x: x.mean((2, 3))) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.second, self.third = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 16, 1)
        self.last, self.linear = last, nn.LazyLinear(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.first(x)), inplace=True), 2)
        return self.linear(self.last(F.relu(self.third(x + self.second(x)))))


def step(model: nn.Module, *shape: int, mixed: bool = True) -> Callable[[], Any]:
    """A training step of a model; its gradients are what it leaves."""
    torch.manual_seed(0)
    x, parameters = torch.randn(*shape), list(model.parameters())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        model(x)

    def program() -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = model(x).float().square().mean()
        return loss.detach(), torch.autograd.grad(loss, parameters)

    return program


def laid_out(program: Callable[[], Any], costs: Costs = COSTS) -> tuple[Graph, Graph]:
    """A program's graph before and after the pass."""
    graph = dead_code(recorded_again(program))
    after = in_channels_last(graph, costs)
    verify(after)
    return graph, after


def images(op: Op) -> list[TensorType]:
    row = ROWS[op.target._opname]
    return [op.args[k].type for k in (*row.operands, *row.weight)]


def copies(graph: Graph) -> list[Op]:
    return [op for op in graph.ops if op.target is aten.clone.default]


def test_everything_between_convolutions_is_in_channels_last() -> None:
    before, after = laid_out(step(Block(), 4, 3, 8, 8))
    able = [op for op in after.ops if op.target._opname in ROWS]
    assert {op.target._opname for op in able} >= {"convolution_backward", "native_batch_norm_backward", "max_pool2d_with_indices"}
    assert all(
        t.stride == type_of(torch.empty(t.shape).to(memory_format=torch.channels_last)).stride for o in able for t in images(o)
    )
    assert [v.type for v in after.outputs] == [v.type for v in before.outputs]


def test_no_copy_is_left_between_calls_of_the_library() -> None:
    graph, costs = recorded_again(step(Block(), 4, 3, 8, 8)), ImagesOnly(RATES["sm_90"])
    plan, plain = (Planner(costs, verify=True, numerics="bitwise", layouts=layouts).plan(graph) for layouts in (True, False))
    assert len(copies(plan.graph)) > 6 and "clone" not in launched(plan)
    assert plan.nbytes == plain.nbytes


def test_what_needs_the_recorded_layout_gets_a_copy() -> None:
    _, flat = laid_out(step(Block(lambda x: x.flatten(1)), 4, 3, 8, 8))
    _, mean = laid_out(step(Block(), 4, 3, 8, 8))
    assert len(copies(flat)) == len(copies(mean)) + 1


def test_at_their_size_small_images_stay_as_they_are() -> None:
    before, after = laid_out(step(Block(), 4, 3, 8, 8), Costs(RATES["sm_90"]))
    assert after is before


def test_a_program_that_is_in_channels_last_already_is_left_alone() -> None:
    model = Block()
    model(torch.randn(4, 3, 8, 8))
    model = model.to(memory_format=torch.channels_last)
    before, after = laid_out(step(model, 4, 3, 8, 8))
    assert all(is_channels_last(v.type) for op in after.ops if op.target._opname == "native_batch_norm" for v in op.results[:1])
    assert len(copies(after)) - len(copies(before)) <= 4  # the batch, and gradients of weights


def test_a_mask_of_a_dropout_is_drawn_over_the_recorded_layout() -> None:
    def last(x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, 0.5).mean((2, 3))

    before, after = laid_out(step(Block(last), 4, 3, 8, 8))
    (dropout,) = [op for op in after.ops if op.effects.random]
    (recorded,) = [op for op in before.ops if op.effects.random]
    assert dropout.inputs[0].type is recorded.inputs[0].type


class Sides(Block):
    """Two ways of convolutions that do not meet."""

    def __init__(self) -> None:
        super().__init__()
        self.other, self.noise = nn.Conv2d(3, 8, 1), torch.randn(4, 3, 8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.other(self.noise).mean((1, 2, 3)).view(-1, 1)


def test_each_connected_part_is_decided_by_itself() -> None:
    asked: list[tuple[int, int]] = []

    class Large(Costs):
        __slots__ = ()

        def channels_last(self, image_bytes: int, copied_bytes: int) -> bool:
            asked.append((image_bytes, copied_bytes))
            return image_bytes > 0

    _, after = laid_out(step(Sides(), 4, 3, 8, 8), Large(RATES["sm_90"]))
    # The other way starts from three channels, for which the library has no vectors.
    convolutions = [op for op in after.ops if op.target is aten.convolution.default]
    assert [is_channels_last(op.results[0].type) for op in convolutions] == [True, True, True, False]
    assert (0, 0) in asked


@pytest.mark.parametrize(
    ("make", "shape", "reason"),
    [
        (lambda: nn.Conv2d(8, 8, 3, groups=8), (2, 8, 6, 6), "it is grouped, and the library has other kernels for that"),
        (lambda: nn.ConvTranspose2d(8, 8, 3), (2, 8, 6, 6), "it is transposed"),
        (lambda: nn.Conv1d(8, 8, 3), (2, 8, 6), "it is not on images with channels"),
        (lambda: nn.Conv2d(8, 8, 3).double(), (2, 8, 6, 6), "it is in more than 32 bits"),
    ],
)
def test_a_refusal_says_why(make: Callable[[], nn.Module], shape: tuple[int, ...], reason: str) -> None:
    torch.manual_seed(0)
    model = make()
    half = next(model.parameters()).dtype is torch.float32
    x = torch.randn(shape, dtype=None if half else torch.float64)

    def program() -> Any:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            return model(x).float()

    graph = recorded_again(program)
    (op,) = [op for op in graph.ops if op.target._opname == "convolution"]
    assert why_not_channels_last(op) == reason
    assert in_channels_last(graph, COSTS) is graph


def test_so_are_convolutions_in_32_bits() -> None:
    before, after = laid_out(step(Block(), 4, 3, 8, 8, mixed=False))
    able = [op for op in after.ops if op.target._opname in ROWS]
    assert {v.type.dtype for op in able for v in op.inputs} == {torch.float32, torch.int64}
    assert all(is_channels_last(t) for op in able for t in images(op) if t.shape[1] > 1 and t.shape[2] > 1)
    assert [v.type for v in after.outputs] == [v.type for v in before.outputs]


def test_the_rule_for_strides_of_pointwise_results_is_that_of_torch() -> None:
    die = random.Random(0)
    for _ in range(500):
        shape = [die.choice((1, 2, 3, 4)) for _ in range(die.randint(1, 5))]
        operands = [
            _operand(die, shape if k == 0 else [n if die.random() < 0.8 else 1 for n in shape]) for k in range(die.randint(1, 3))
        ]
        functions: dict[int, Any] = {1: torch.relu, 2: torch.add, 3: torch.addcmul}
        found = functions[len(operands)](*operands)
        assert elementwise(found.shape, [type_of(t) for t in operands]) == found.stride(), [
            (t.shape, t.stride()) for t in operands
        ]


def test_a_copy_has_the_strides_that_torch_gives_it() -> None:
    die = random.Random(1)
    seen = set()
    for _ in range(300):
        x = _operand(die, [die.choice((1, 1, 2, 3)) for _ in range(die.randint(1, 5))])
        value, recorded = Value(0, type_of(x), 0), Value(1, type_of(x.contiguous()), 1)
        op = Op(aten.clone.default, Kind.POINTWISE, (value,), (), (value,), Result(0), (recorded,))
        (found,) = _pointwise(op) or ()
        assert found.stride == x.clone().stride(), (x.shape, x.stride())
        seen.add(found.stride == elementwise(x.shape, [type_of(x)]))
    assert seen == {False, True}, "where a dimension has one element, other operators give it another stride"


@pytest.mark.parametrize(
    ("shape", "dims", "keeps", "over"),
    [
        ((2, 3, 4, 5), (2, 3), True, True),
        ((2, 3, 4, 5), (-1, -2), False, True),
        ((2, 3, 4, 5), (0, 2, 3), False, True),
        ((2, 3, 4, 5), (0, 2, 3), True, False),
        ((2, 3, 4, 5), (1,), False, False),
        ((3, 4, 5), (2,), False, False),
    ],
)
def test_sums_over_images(shape: tuple[int, ...], dims: tuple[int, ...], keeps: bool, over: bool) -> None:
    value = Value(0, default_type(torch.float32, shape), 0)
    op = Op(aten.sum.dim_IntList, Kind.REDUCTION, (value, dims, keeps), (), (value,), Result(0), (value,))
    assert _over_images(op) is over


def _operand(die: random.Random, shape: list[int]) -> torch.Tensor:
    if len(shape) == 4 and die.random() < 0.3:
        return torch.empty(shape).to(memory_format=torch.channels_last)
    order = list(range(len(shape)))
    if die.random() < 0.7:
        die.shuffle(order)
    tensor = torch.empty([shape[d] + (die.random() < 0.1) for d in order]).permute([order.index(d) for d in range(len(shape))])
    for d, n in enumerate(shape):
        tensor = tensor.narrow(d, 0, n)
    return tensor[:1].expand(shape) if die.random() < 0.1 else tensor
