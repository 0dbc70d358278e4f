"""Tensors that get another geometry, memory or dtype in place, where a graph hands the same results out again and again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kitsune
from tests.runtime.repeated import counts, graphs

STEPS = 10
pytestmark = pytest.mark.usefixtures("repeatable")
Change = Callable[[Tensor, int], Any]


def becomes_data(b: Tensor, k: int) -> None:
    b.data = torch.full((2, 2), float(k))


def becomes_double(b: Tensor, k: int) -> None:
    b.data = b.double()


def in_turns(b: Tensor, k: int) -> None:
    if k % 2:
        b.t_()


CHANGES: dict[str, Change] = {
    "t_": lambda b, k: b.t_(),
    "t_ in turns": in_turns,
    "transpose_": lambda b, k: b.transpose_(0, 1),
    "swapaxes_": lambda b, k: b.swapaxes_(0, 1),
    "unsqueeze_": lambda b, k: b.unsqueeze_(0),
    "as_strided_": lambda b, k: b.as_strided_((2, 3), (1, 2)),
    "resize_": lambda b, k: b.resize_(2, 3),
    "resize_ to more": lambda b, k: b.resize_(5, 4).fill_(k),
    "set_": lambda b, k: b.set_(b[1:].clone()),
    "data": becomes_data,
    "dtype": becomes_double,
}
WHERE = ["in the region", "behind a read", "disabled"]


def run(change: Change, where: str, kitsunes: bool) -> list[Any]:
    torch.manual_seed(0)
    found: list[Any] = []
    for k, x in enumerate(torch.randn(STEPS, 4, 4).unbind()):
        with kitsune.accelerate(device="cpu") if kitsunes else contextlib.nullcontext():
            a = x * 2
            b = a + 1
            if where == "behind a read":
                found.append(b.sum().item())
            with kitsune.disable() if where == "disabled" else contextlib.nullcontext():
                change(b, k)
            seen = b.shape, b.stride(), b.dtype
            c = b.exp()
            del a
        found.append([seen, b.tolist(), b.shape, b.stride(), c.tolist(), c.stride()])
    return found


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("name", list(CHANGES))
def test_results_have_the_geometry_that_they_were_given(name: str, where: str) -> None:
    expected = run(CHANGES[name], where, False)
    with kitsune.config.patch(gate=False), graphs(kernels=False):
        assert run(CHANGES[name], where, True) == expected
        assert counts("replayed")[0] >= STEPS - 4


def test_a_recurrent_layer_that_has_the_batch_first_is_replayed_as_one_region() -> None:
    """torch transposes its result in place."""

    def losses(context: Any) -> list[float]:
        torch.manual_seed(0)
        net = nn.RNN(8, 8, batch_first=True)

        def step(x: Tensor) -> Tensor:
            loss = net(x)[0].square().mean()
            loss.backward()
            return loss.detach()

        found = []
        for x in torch.randn(STEPS, 3, 2, 8).unbind():
            with context:
                found.append(step(x))
        return [loss.item() for loss in found] + [p.grad.sum().item() for p in net.parameters() if p.grad is not None]

    expected = losses(contextlib.nullcontext())
    with kitsune.config.patch(gate=False), graphs(kernels=False):
        assert losses(kitsune.accelerate(device="cpu")) == expected
        replayed, regions = counts("replayed", "regions")
    # Of the first step, and of all others: its gradients are new in the one, and are added to in the others.
    assert replayed >= STEPS - 4 and regions == 2


@pytest.mark.parametrize("all_of_it", [True, False])
def test_a_model_in_another_precision_in_mid_training(all_of_it: bool) -> None:
    """With its gradients; or without them, which stay what they are."""

    def train(context: Any) -> list[Any]:
        torch.manual_seed(0)
        net, found = nn.Linear(4, 2), list[Any]()
        for k, x in enumerate(torch.randn(STEPS, 3, 4).unbind()):
            with context:
                if k == 5 and all_of_it:
                    net.double()
                net.zero_grad(set_to_none=k != 5)
                loss = net(x.to(net.weight.dtype)).square().mean()
                loss.backward()
                for p in net.parameters():
                    assert p.grad is not None
                    p.data.sub_(p.grad, alpha=0.1)
                    if k == STEPS - 1 and not all_of_it:
                        p.data = p.data.double()
                found.append(loss.detach())
        for p in net.parameters():
            assert p.grad is not None
            found += [p.data, p.grad]
        return [(t.tolist(), t.dtype) for t in found]

    expected = train(contextlib.nullcontext())
    with kitsune.config.patch(gate=False):
        assert train(kitsune.accelerate(device="cpu")) == expected
    assert counts("followed")[0] > 0
