"""What a backward needs is written before it: it raises as in eager, also where the calls and the write were followed.

In steps 0 to 3 nothing needs what was written; in step 4 a backward does, and step 5 looks at the counts of writes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kitsune

Body = Callable[[int, Tensor, Tensor, list[Any]], None]
BODIES: dict[str, Body] = {}


def body(function: Body) -> Body:
    BODIES[function.__name__] = function
    return function


def end(i: int, spoilt: Tensor, other: Tensor, seen: list[Any], *looked_at: Tensor) -> None:
    if i == 5:
        seen.append([t._version for t in looked_at])
    (spoilt if i == 4 else other).sum().backward()


@body
def a_result(i: int, w: Tensor, x: Tensor, seen: list[Any]) -> None:
    y = (w * x).tanh()
    with torch.no_grad():
        y.mul_(2)
    end(i, y, w * 3, seen, y)


@body
def a_result_that_nobody_needs(i: int, w: Tensor, x: Tensor, seen: list[Any]) -> None:
    y = w * x
    with torch.no_grad():
        y.mul_(2)
    end(i, y, y, seen, y)


@body
def a_parameter(i: int, w: Tensor, x: Tensor, seen: list[Any]) -> None:
    y, z = w * w, x * w
    with torch.no_grad():
        w.mul_(2)
    end(i, y, z, seen, w)


@body
def a_view_of_a_parameter(i: int, w: Tensor, x: Tensor, seen: list[Any]) -> None:
    y, view = w * w, w.view(-1)
    with torch.no_grad():
        view.mul_(2)
    end(i, y, w * x, seen, w, view)


@body
def a_detached_result(i: int, w: Tensor, x: Tensor, seen: list[Any]) -> None:
    y = w.tanh()
    detached = y.detach()
    detached.mul_(2)
    end(i, y, w * x, seen, y, detached)


@body
def a_detached_view_of_a_result(i: int, w: Tensor, x: Tensor, seen: list[Any]) -> None:
    y = w.tanh()
    view = y.view(-1)
    detached = view.detach()
    detached.mul_(2)
    end(i, y, w * x, seen, y, view)


@body
def data_which_does_not_count(i: int, w: Tensor, x: Tensor, seen: list[Any]) -> None:
    y = w.tanh()
    y.data.mul_(2)
    end(i, y, w * x, seen, y)


@body
def a_result_with_its_history(i: int, w: Tensor, x: Tensor, seen: list[Any]) -> None:
    y = w.tanh()
    z = y * x
    y.mul_(2)
    end(i, z, w * x, seen, y)


@body
def a_part_of_a_result(i: int, w: Tensor, x: Tensor, seen: list[Any]) -> None:
    y = w.tanh()
    z, part = y * x, y[1:]
    part.mul_(2)
    end(i, z, w * x, seen, y, part)


@body
def a_batch(i: int, w: Tensor, x: Tensor, seen: list[Any]) -> None:
    y, z = w * x, w * 2
    x.mul_(1.5)
    end(i, y, z, seen, x)


@body
def parameters_by_an_update(i: int, w: Tensor, x: Tensor, seen: list[Any]) -> None:
    optimizer = torch.optim.SGD([w], lr=0.1)
    y, z = w * w, x * w
    z.sum().backward()
    optimizer.step()
    end(i, y, w * x, seen, w)


def run(step: Body, context: Callable[[], Any]) -> list[Any]:
    torch.manual_seed(0)
    w, x, seen = torch.nn.Parameter(torch.randn(3)), torch.randn(3), []
    for i in range(6):
        with context():
            w.grad = None
            try:
                step(i, w, x, seen)
            except RuntimeError as error:
                seen.append(str(error)[:50])
        seen += [w.detach().tolist(), None if w.grad is None else w.grad.tolist()]
        with torch.no_grad():
            w.copy_(torch.arange(3.0) + i)
            x.clamp_(-2, 2)
    return seen


@pytest.mark.parametrize("step", BODIES.values(), ids=BODIES)
def test_a_backward_that_needs_what_was_written_raises_as_in_eager(step: Body) -> None:
    expected = run(step, contextlib.nullcontext)
    kitsune.reset()
    assert run(step, lambda: kitsune.accelerate(device="cpu")) == expected
    assert kitsune.counters()["followed"] >= 10
