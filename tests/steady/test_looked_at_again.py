"""What one step has made is looked at in the next: a look without gradients tells nothing of the history behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kitsune

STEPS = 12
pytestmark = pytest.mark.usefixtures("repeatable")
Look = Callable[[Tensor], Any]


def without_gradients(a: Tensor) -> Tensor:
    with torch.no_grad():
        return a * 2


LOOKS: dict[str, Look] = {
    "under no_grad": without_gradients,
    "detached": lambda a: a.detach() + 1,
    "argmax": lambda a: a.argmax(1),
    "the function argmax": lambda a: torch.argmax(a, dim=1),
    "into a tensor": lambda a: torch.argmax(a, 1, out=torch.empty(4, dtype=torch.long)),
    "equal": lambda a: a == 0,
    "less": lambda a: (a < 0).float().mean(),
    "not a number": lambda a: torch.isnan(a).any(),
}


@pytest.fixture(params=[0, 1], ids=["warmup=0", "warmup=1"])
def kitsunes(request: pytest.FixtureRequest) -> Iterator[Any]:
    kitsune.reset()
    with kitsune.config.patch(gate=False):
        yield lambda: kitsune.accelerate(device="cpu", warmup=request.param)


def carried(look: Look, graded: Callable[[int], bool], end: Callable[[], None]) -> list[Any]:
    """A state that is carried into the next region, in some steps with its history, and what all gradients are then."""
    torch.manual_seed(0)
    head, state = nn.Linear(6, 3), nn.Parameter(torch.randn(4, 3))
    optimizer = torch.optim.SGD([*head.parameters(), state], lr=0.1)
    found: list[Any] = []
    for k, x in enumerate(torch.randn(STEPS, 4, 6).unbind()):
        a = (state if graded(k) else state.detach()) + 1
        end()
        look(a)
        extra = a.sum()
        found.append(extra.requires_grad)
        optimizer.zero_grad()
        (head(x).square().mean() + extra).backward()
        found.extend(None if p.grad is None else p.grad.tolist() for p in (*head.parameters(), state))
        optimizer.step()
    return found


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", list(LOOKS))
def test_a_history_that_comes_or_goes_behind_a_look_is_seen(name: str, first: bool, kitsunes: Any) -> None:
    def graded(k: int) -> bool:
        return (k > 5 and k % 3 == 2) != first

    expected = carried(LOOKS[name], graded, lambda: None)
    with kitsunes():
        assert carried(LOOKS[name], graded, kitsune.flush) == expected
    assert kitsune.counters()["recorded"]
