"""Python that runs at any moment, since something dies: it asks for what is pending while calls are made again."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor
from torch.nn import functional as F

import kitsune
from kitsune.lazy import realize
from tests.runtime.repeated import graphs
from tests.steady.test_cuts import Loop, run

ASKS: dict[str, Callable[[Tensor], Any]] = {
    "a number": lambda z: z.item(),
    "a list": lambda z: z.tolist(),
    "numpy": lambda z: z.numpy().tolist(),
    "print": str,
}


class Dies:
    """When it dies, it asks for a value."""

    def __init__(self, ask: Callable[[Tensor], Any], z: Tensor, found: list[Any]) -> None:
        self.ask, self.z, self.found = ask, z, found

    def __del__(self) -> None:
        self.found.append(self.ask(self.z))


def step(t: Loop, k: int, ask: Callable[[Tensor], Any], dying: list[Any], told: list[Any], read: bool) -> None:
    z = (t.xs[k, 0] * 2).sum()
    hidden = F.relu(t.xs[k, 0] * 3, inplace=True)
    loss = t.loss(k) + F.dropout(t.net.second(hidden), 0.5).square().mean()
    if read:
        t.found.append(loss.item())
    if k in (6, 9):
        dying.append(Dies(ask, z, told))
    del z
    # It asks for the graph, so that the calls are made again.
    t.found.append(type(loss.grad_fn).__name__ if k in (6, 9) else None)
    dying.clear()
    loss.backward()
    t.update()


@pytest.mark.parametrize("way", ["op by op", "replayed"])
@pytest.mark.parametrize("read", [False, True], ids=["", "behind a read"])
@pytest.mark.parametrize("n", [0, 8])
@pytest.mark.parametrize("ask", ASKS)
def test_it_asks_while_calls_are_made_again(ask: str, n: int, read: bool, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something dies at the `n`th operator of the first call that is made again, and of the next ones."""
    dying, seen, died = list[Any](), [0], list[bool]()
    take = realize.Walk.take

    def taken(self: Any, row: Any, tensors: Any) -> Any:
        seen[0] += 1
        if seen[0] > n and dying:
            died.append(True)
            dying.clear()
        return take(self, row, tensors)

    monkeypatch.setattr(realize.Walk, "take", taken)
    found = []
    with kitsune.config.patch(gate=False):
        for context in (contextlib.nullcontext(), kitsune.accelerate(device="cpu")):
            kitsune.reset()
            with graphs(kernels=False) if way == "replayed" else contextlib.nullcontext():
                seen[0] = 0
                told = list[Any]()
                found.append([run(functools.partial(step, ask=ASKS[ask], dying=dying, told=told, read=read), context)[0], told])
    assert found[0] == found[1]
    assert len(died) == 2
