"""A batch that does not begin at a multiple of 16 bytes has the bits that eager gives it, also behind a capture."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import kitsune
from kitsune.config import config
from kitsune.runtime.alignment import ALIGNMENT, alignment, place_like, summed_inputs
from kitsune.runtime.places import Places
from tests.plan.recorded import recorded_again
from tests.runtime.repeated import counts, graphs

FLOATS, ROWS, COLUMNS, STEPS = 4, 5, 6, 24
ON = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]
WHY = "an input begins elsewhere within 16 bytes, where a library may add up in another order"


def training(
    device: str, dtype: torch.dtype, loss_of: Callable[[Any, Any, Any], Any], columns: int = COLUMNS
) -> list[torch.Tensor]:
    """The losses and the weights of a training on slices of 5 rows, all of which begin at another multiple of an element."""
    generator = torch.Generator().manual_seed(0)
    data, weight, target = (
        torch.randn(*shape, generator=generator) for shape in ((ROWS * STEPS + 1, columns), (7, columns), (ROWS, 7))
    )
    data, target, weight = data.to(device, dtype), target.to(device, dtype), weight.to(device, dtype).requires_grad_()
    optimizer = torch.optim.SGD([weight], 0.05)
    losses = []
    for k in range(STEPS):
        loss = loss_of(data[ROWS * k + 1 : ROWS * (k + 1) + 1], weight, target)
        loss.backward()
        losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    return [t.cpu() for t in (*losses, weight.detach())]


def product(x: Any, weight: Any, target: Any) -> Any:
    return (F.linear(x, weight) * target).float().sum()


def by_element(x: Any, weight: Any, target: Any) -> Any:
    return ((x * 2).tanh()[:, :1] * weight[:, 0] * target).float().sum()


@pytest.mark.parametrize("device", ON)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_slices_that_begin_anywhere_have_eagers_bits(device: str, dtype: torch.dtype) -> None:
    context = graphs(kernels=False) if device == "cpu" else contextlib.nullcontext()
    kitsune.reset()
    with context, config.patch(gate=False), kitsune.accelerate(device=device, numerics="bitwise"):
        got = training(device, dtype, product)
        replayed, missed = counts("replayed", "graph_missed")
    kitsune.reset()
    expected = training(device, dtype, product)
    assert all(map(torch.equal, got, expected))
    # The slices begin 120 or 60 bytes behind each other: every second or fourth one as the one that was captured.
    assert replayed >= STEPS * dtype.itemsize // 8 - 3 and missed[WHY] >= STEPS // 2 - 3


def test_where_each_element_is_worked_out_by_itself_all_are_replayed() -> None:
    with graphs(kernels=False), config.patch(gate=False), kitsune.accelerate(device="cpu"):
        training("cpu", torch.float32, by_element)
        replayed, missed = counts("replayed", "graph_missed")
    assert replayed == STEPS - 2 and WHY not in missed


def test_slices_that_begin_at_multiples_of_16_bytes_are_all_replayed() -> None:
    with graphs(kernels=False), config.patch(gate=False), kitsune.accelerate(device="cpu"):
        training("cpu", torch.float32, product, columns=8)
        replayed, missed = counts("replayed", "graph_missed")
    assert replayed == STEPS - 2 and WHY not in missed


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (lambda x, y, n: x @ y, {(4, 5), (5, 3)}),
        (lambda x, y, n: x[1:] @ y.relu(), {(3, 5)}),
        (lambda x, y, n: x.sum() * y, {(4, 5)}),
        (lambda x, y, n: F.dropout(x, 0.5), {(4, 5)}),
        (lambda x, y, n: x[n] + F.mse_loss(x, x * 2), set()),
        (lambda x, y, n: (torch.cat([x, x]).cumsum(0), y * 2), set()),
        (lambda x, y, n: n.sum() + n.cumsum(0), set()),
    ],
)
def test_which_inputs_it_matters_for(program: Callable[..., Any], expected: set[tuple[int, ...]]) -> None:
    given = torch.randn(4, 5), torch.randn(5, 3), torch.tensor([1, 0, 3, 2])
    graph = recorded_again(lambda: program(*given))
    found = summed_inputs(graph, Places(graph))
    assert {tuple(v.type.shape) for v in graph.inputs if v.id in found} == expected


@pytest.mark.parametrize("behind", [0, 1, 2, 3])
@pytest.mark.parametrize("strides", [(6, 1), (1, 5), (12, 2), (0, 1)])
def test_a_place_begins_as_what_it_stands_for(behind: int, strides: tuple[int, int]) -> None:
    memory = torch.randn(100)
    assert alignment(memory) == 0
    tensor = memory.as_strided((5, 6), strides, behind)
    place = place_like(tensor, exactly=True)
    assert (place.shape, place.stride(), place.dtype) == (tensor.shape, tensor.stride(), tensor.dtype)
    assert alignment(place) == alignment(tensor) == behind * FLOATS % ALIGNMENT
    assert alignment(place_like(tensor, exactly=False)) == 0
    assert place_like(tensor[:0], exactly=True).shape == (0, 6)
