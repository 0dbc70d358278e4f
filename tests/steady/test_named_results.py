"""Calls that return several tensors with names, as `max` along a dimension and `topk` do, are followed like others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kitsune

STEPS = 10
pytestmark = pytest.mark.usefixtures("repeatable")

CALLS: dict[str, Callable[[Tensor], Any]] = {
    "max": lambda h: torch.max(h, 1),
    "min, kept": lambda h: h.min(dim=-1, keepdim=True),
    "topk": lambda h: h.topk(3, 1),
    "sort": lambda h: torch.sort(h, dim=1, descending=True),
    "median": lambda h: h.median(1),
    "kthvalue": lambda h: torch.kthvalue(h, 2, 1),
    "mode": lambda h: torch.mode(h, 1),
    "cummax": lambda h: torch.cummax(h, 1),
    "svd": lambda h: torch.linalg.svd(h, full_matrices=False),
    "qr": lambda h: torch.linalg.qr(h),
    "slogdet": lambda h: torch.linalg.slogdet(h[:, :8] + 4 * torch.eye(8)),
}
TAKES: dict[str, Callable[[Any], Tensor]] = {
    "svd": lambda found: found.S,
    "qr": lambda found: found.R,
    "slogdet": lambda found: found.logabsdet,
}


def train(call: Callable[[Tensor], Any], take: Callable[[Any], Tensor], asks: bool = False) -> list[Any]:
    """With `asks` the gradient of a weight is asked for by itself in some steps."""
    torch.manual_seed(0)
    first, head = nn.Linear(6, 12), nn.Linear(1, 3)
    optimizer = torch.optim.SGD([*first.parameters(), *head.parameters()], lr=0.05, momentum=0.9)
    x, y, seen = torch.randn(8, 6), torch.arange(8) % 3, []
    for k in range(STEPS):
        optimizer.zero_grad()
        found = call(first(x))
        value = take(found)
        value = (value if value.dim() == 2 else value.reshape(-1, 1)).mean(1, keepdim=True).expand(8, 1)
        loss = nn.functional.cross_entropy(head(value), y)
        if asks and k % 3 == 2:
            seen += [t.detach() for t in torch.autograd.grad(loss, [first.weight], retain_graph=True)]
            seen.append(type(found[0].grad_fn).__name__)
        loss.backward()
        seen += [type(found), *(t.requires_grad for t in found), loss.detach()]
        # Also the part that is no number.
        seen += [t.detach() for t in found]
        optimizer.step()
    values = [s.tolist() if isinstance(s, Tensor) else s for s in seen]
    return [*values, *(p.tolist() for p in (*first.parameters(), *head.parameters()))]


@pytest.mark.parametrize("warmup", [0, 1])
@pytest.mark.parametrize("name", list(CALLS))
def test_a_backward_through_a_named_result_is_followed(name: str, warmup: int) -> None:
    take = TAKES.get(name, lambda found: found.values)
    expected = train(CALLS[name], take)
    kitsune.reset()
    with kitsune.config.patch(gate=False), kitsune.accelerate(device="cpu", warmup=warmup):
        got = train(CALLS[name], take)
    assert got == expected
    counters = kitsune.counters()
    assert counters["backwards_followed"] >= STEPS - 3, kitsune.explain()


@pytest.mark.parametrize("name", list(CALLS))
def test_a_named_result_has_its_history_where_that_is_asked_for(name: str) -> None:
    take = TAKES.get(name, lambda found: found.values)
    expected = train(CALLS[name], take, asks=True)
    kitsune.reset()
    with kitsune.config.patch(gate=False), kitsune.accelerate(device="cpu"):
        assert train(CALLS[name], take, asks=True) == expected
    assert kitsune.counters()["backwards_followed"] >= STEPS // 2
