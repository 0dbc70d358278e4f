"""What a rectifier behind a batch norm let pass is worked out again where only the norm's backward asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import kitsune
from kitsune.ir import Graph, Op, verify
from kitsune.scheduler import batch_norms, dead_code
from tests.plan.recorded import recorded_again

aten = torch.ops.aten
HALF = torch.bfloat16
SHAPE = (2, 16, 4, 4)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    kitsune.reset()
    yield


def block(
    between: Callable[..., Any] = lambda **_: None,
    level: float = 0,
    bias: bool = True,
    in_place: bool = True,
    other: bool = False,
) -> Any:
    """A norm, its rectifier, and the gradients of both; `between` sees all of it before the backward of the norm."""
    x = torch.zeros(SHAPE, dtype=HALF).to(memory_format=torch.channels_last)
    grad, w, b = torch.zeros_like(x), torch.ones(16), torch.ones(16) if bias else None
    mean, var, behind = torch.zeros(16), torch.ones(16), torch.ones(16) if other else w

    def program() -> Any:
        image, into = x * 2, grad * 3
        y, *saved = aten.native_batch_norm(image, w, b, mean, var, True, 0.1, 1e-5)
        y = y.relu_() if in_place else y.relu()
        through = aten.threshold_backward(into, y.detach(), level)
        kept = between(image=image, weight=w, bias=b, through=through, saved=saved)
        return [
            y,
            kept,
            *aten.native_batch_norm_backward(through, image, behind, mean, var, *saved, True, 1e-5, [True, True, True]),
        ]

    return program


def taken_apart(program: Any, why_not: Callable[[Op], str | None] = lambda op: None) -> Graph:
    graph = batch_norms(dead_code(recorded_again(program)), why_not)
    verify(graph)
    return graph


def thresholds(graph: Graph) -> list[Op]:
    return [op for op in graph.ops if op.target is aten.threshold_backward.default]


@pytest.mark.parametrize("in_place", [False, True])
def test_what_passed_is_worked_out_for_the_sums_and_for_the_gradient(in_place: bool) -> None:
    graph = taken_apart(block(in_place=in_place))
    rectified = next(op for op in graph.ops if op.target in (aten.relu.default, aten.relu_.default))
    before, after = thresholds(graph)
    made = {v.id: op for op in graph.ops for v in op.results}
    for threshold in (before, after):
        # By the forward's own arithmetic, and for one kernel only.
        chain = [threshold]
        while chain[-1].target is not aten.sub.Tensor:
            chain.append(made[chain[-1].args[1 if chain[-1] is threshold else 0].id])
        forward = [made[rectified.inputs[0].id]]
        while forward[-1].target is not aten.sub.Tensor:
            forward.append(made[forward[-1].args[0].id])
        assert [op.target for op in chain[1:]] == [op.target for op in forward] and all(op.late for op in chain)
        assert chain[-1].args[0] == forward[-1].args[0]
    assert before.results[0].id != after.results[0].id


@pytest.mark.parametrize(
    "program",
    [
        block(lambda through, **_: through * 2),
        block(lambda through, **_: through),
        block(lambda weight, **_: weight.mul_(2) * 1),
        block(lambda bias, **_: bias.mul_(2) * 1),
        block(lambda image, **_: image.mul_(2) * 1),
        block(lambda saved, **_: saved[0].view(4, 4).mul_(2) * 1),
        block(lambda saved, **_: saved[1].mul_(2) * 1),
        block(level=0.5),
        block(bias=False),
        block(other=True),
    ],
    ids=(
        "read too,seen,weight written,bias written,image written,mean written through a view,deviation written,"
        "another level,no bias,another weight in the backward"
    ).split(","),
)
def test_otherwise_the_gradient_is_written(program: Any) -> None:
    assert len(thresholds(taken_apart(program))) == 1


def test_of_a_forward_by_the_library_nothing_is_worked_out_again() -> None:
    """Its last bit may be another, and with it the sign of what is next to zero."""
    graph = taken_apart(block(), lambda op: "no" if op.target is aten.var_mean.correction else None)
    assert any(op.target is aten.native_batch_norm.default for op in graph.ops)
    (threshold,) = thresholds(graph)
    assert not threshold.late and not any(op.target is aten.native_batch_norm_backward.default for op in graph.ops)


def test_a_backward_by_the_library_is_given_the_gradient() -> None:
    graph = taken_apart(block(), lambda op: "no" if op.target is aten.sum.dim_IntList else None)
    (threshold,) = thresholds(graph)
    (left,) = [op for op in graph.ops if op.target is aten.native_batch_norm_backward.default]
    assert left.args[0] is threshold.results[0] and threshold in graph.ops[: graph.ops.index(left)]
