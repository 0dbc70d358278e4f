"""Evaluation in inference mode, of what is older than the mode: views of it are no inference tensors, and are not refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kitsune

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "t": lambda w: w.t(),
    "view": lambda w: w.view(-1),
    "slice": lambda w: w[:2],
    "detach": lambda w: w.detach(),
    "unbind": lambda w: w.unbind()[0],
    "complex": lambda w: torch.view_as_complex(w.view(5, 2, 2)).real,
    "a view of a view": lambda w: w[1:].expand(2, 4, 4),
}


def viewed(view: Callable[[Tensor], Tensor], kind: str) -> list[Any]:
    weight, found = nn.Parameter(torch.arange(20.0).view(5, 4)), []
    for _ in range(5):
        base = {"parameter": weight, "result": weight * 2, "detached": weight.detach().mul_(1.5)}[kind]
        with torch.inference_mode():
            seen = view(base)
            more = seen + 1
            found += [seen.tolist(), more.tolist(), more.is_inference()]
        found.append(weight._version)
    return found


@pytest.mark.parametrize("kind", ["parameter", "result", "detached"])
@pytest.mark.parametrize("name", list(VIEWS))
def test_views_of_what_is_older_are_taken_as_in_eager(name: str, kind: str) -> None:
    expected = viewed(VIEWS[name], kind)
    for warmup in (0, 1):
        kitsune.reset()
        with kitsune.accelerate(device="cpu", warmup=warmup):
            assert viewed(VIEWS[name], kind) == expected


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_a_kernel_sees_that_no_gradient_is_wanted(kind: str) -> None:
    torch.manual_seed(0)
    net = nn.LSTM(2, 5, 2, batch_first=True) if kind == "lstm" else nn.GRU(2, 5, 2)
    x = torch.randn(4, 6, 2).transpose(0, 1)
    with torch.inference_mode():
        expected = net(x)[0]
    for warmup in (0, 1):
        kitsune.reset()
        with kitsune.accelerate(device="cpu", warmup=warmup), torch.inference_mode():
            assert all(torch.equal(net(x)[0], expected) for _ in range(3))
            with kitsune.disable():
                assert torch.equal(net(x)[0], expected)


@pytest.mark.parametrize("kind", ["leaf", "result"])
def test_composite_views_are_views(kind: str) -> None:
    for view in (lambda w: w.reshape(4, 5), lambda w: w.narrow(0, 1, 2), lambda w: w.mT, lambda w: w.chunk(2)[0]):
        with kitsune.accelerate(device="cpu"):
            base = torch.ones(5, 4) if kind == "result" else nn.Parameter(torch.ones(5, 4))
            with torch.inference_mode():
                seen = view(base)
                assert not seen.is_inference()
                seen.mul_(2)
            assert base.sum().item() > 20


class Positions(nn.Module):
    """Tables that are bounded in norm, and added as far as the sequence goes."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(7, 4, max_norm=0.5), nn.Parameter(torch.randn(6, 4))
        self.last = nn.Linear(4, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.table(x) + self.places[: x.shape[1]])


def trained() -> list[Tensor]:
    torch.manual_seed(0)
    net, found = Positions(), []
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for k in range(8):
        x = torch.randint(0, 7, (3, 5))
        loss = F.cross_entropy(net(x).flatten(0, 1), x.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if k % 2:
            with torch.inference_mode():
                found += [net(x[:, : k % 4 + 1]).clone(), net(x).argmax(-1).clone()]
        found.append(loss.detach())
    return [*found, *(p.detach() for p in net.parameters())]


@pytest.mark.parametrize("warmup", [0, 1])
def test_a_model_is_evaluated_between_its_steps(warmup: int) -> None:
    expected = trained()
    kitsune.reset()
    with kitsune.accelerate(device="cpu", warmup=warmup):
        found = trained()
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_a_number_is_asked_for_in_inference_mode_while_a_backward_is_owed() -> None:
    """Calls are made again there, behind a read: what they had made, which nobody holds, is no inference tensor."""

    def losses() -> list[Any]:
        torch.manual_seed(0)
        net, found = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), []
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for k in range(8):
            loss = F.cross_entropy(net(torch.randn(4, 8)), torch.randint(0, 3, (4,)))
            found.append(loss.item())
            if k in (5, 7):
                with torch.inference_mode():
                    found.append(net[0].weight.sum().item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found += net.parameters()
        return [t.tolist() if isinstance(t, Tensor) else t for t in found]

    expected = losses()
    kitsune.reset()
    with kitsune.accelerate(device="cpu"):
        assert losses() == expected


class Marked(Tensor):
    pass


MADE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "recorded": lambda w, shared: w * 2,
    "of memory that NumPy has": lambda w, shared: shared * 2,
    "of a size that depends on data": lambda w, shared: w.nonzero().float(),
    "a part of it": lambda w, shared: w.nonzero().float()[1:],
    "chosen": lambda w, shared: w[w > 0],
    "once sparse": lambda w, shared: w.to_sparse().to_dense(),
    "complex and conjugate": lambda w, shared: torch.view_as_real((w[w > 0] * 1j).conj().resolve_conj()),
    "a view of what is older": lambda w, shared: w[1:],
    "a view of what NumPy has": lambda w, shared: shared[1:],
}
USED: dict[str, Callable[[Tensor, nn.Parameter], Any]] = {
    "nothing": lambda t, w: t,
    "saved": lambda t, w: (t * w.sum()).sum().backward(),
    "a Parameter": lambda t, w: nn.Parameter(t),
    "a frozen Parameter": lambda t, w: nn.Parameter(t, requires_grad=False),
    "_make_subclass": lambda t, w: torch.Tensor._make_subclass(nn.Parameter, t),
    "a subclass": lambda t, w: t.as_subclass(Marked),
    "a view": lambda t, w: t[:1],
    "a written view": lambda t, w: t[:1].add_(1),
    "detached": lambda t, w: t.detach(),
    "written": lambda t, w: t.add_(1),
    "written in the mode": torch.inference_mode()(lambda t, w: t.add_(1)),
    "versions": lambda t, w: t._version,
}


def used(make: str, use: str) -> list[Any]:
    found: list[Any] = []
    for _ in range(4):
        weight, shared = nn.Parameter(torch.ones(2, 3)), torch.ones(2, 3)
        shared.numpy()
        with torch.inference_mode():
            t = MADE[make](weight.detach(), shared)
            found.append(t.tolist())
        try:
            result = USED[use](t, weight)
        except RuntimeError as error:
            result = str(error)[:60]
        seen = [(r.is_inference(), r.requires_grad, r.tolist()) for r in (result, t) if isinstance(r, Tensor)]
        found += [result if isinstance(result, (str, int)) else None, seen]
    return found


@pytest.mark.parametrize("use", list(USED))
@pytest.mark.parametrize("make", list(MADE))
def test_what_is_made_in_the_mode_is_an_inference_tensor(make: str, use: str) -> None:
    expected = used(make, use)
    for warmup in (0, 1):
        kitsune.reset()
        with kitsune.config.patch(gate=False), kitsune.accelerate(device="cpu", warmup=warmup):
            assert used(make, use) == expected
