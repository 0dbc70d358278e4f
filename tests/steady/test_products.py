"""Products see a batch of three dimensions as a matrix: that view is theirs, and the calls are followed; numbers stay eager's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kitsune
from tests.runtime.repeated import graphs
from tests.steady.loops import WHERE, device_of, graphs_of

STEPS, AT = 12, 8
pytestmark = pytest.mark.usefixtures("repeatable")


class Net(nn.Module):
    """Its first layer gets the batch; `product` says how."""

    def __init__(self, product: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.product = nn.Linear(8, 4), nn.Linear(4, 2), product

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.product(x, self.first.weight, self.first.bias)))


PRODUCTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "linear": F.linear,
    "without bias": lambda x, w, b: F.linear(x, w),
    "matmul": lambda x, w, b: torch.matmul(x, w.t()) + b,
    "operator": lambda x, w, b: x @ w.t() + b,
    "method": lambda x, w, b: x.matmul(w.t()) + b,
    "mm": lambda x, w, b: torch.mm(x.reshape(-1, 8), w.t().contiguous()) + b,
    "of a transposed weight": lambda x, w, b: F.linear(x.reshape(-1, 8), w.contiguous().t().t()) + b,
    "broadcast": lambda x, w, b: torch.matmul(x, torch.stack([w.t(), 2 * w.t()])[:, None]).sum(0) + b,
    "from the right": lambda x, w, b: (w @ x.mT).mT + b,
}
Batch = Callable[[Tensor], Tensor]
BATCHES: dict[str, Batch] = {
    "as it is": lambda x: x,
    "another shape": lambda x: x[:2].clone(),
    "two dimensions": lambda x: x[0].clone(),
    "four dimensions": lambda x: x.clone()[None],
    "behind an offset": lambda x: torch.cat([x, x])[1:4],
    "other strides": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "needs a gradient": lambda x: x.clone().requires_grad_(),
    "shared with numpy": lambda x: torch.from_numpy(x.cpu().numpy().copy()).to(x.device),
    "double": lambda x: x.double().float(),
    "empty": lambda x: x[:0],
    "broadcast": lambda x: x[:1].expand(3, 5, 8),
}


def batches(batch: Batch, device: str) -> list[Tensor]:
    """One for each step, that of step AT in another way; they come from outside of all contexts."""
    torch.manual_seed(1)
    xs = [torch.randn(3, 5, 8).to(device) for _ in range(STEPS)]
    return [batch(x) if k == AT else x for k, x in enumerate(xs)]


def train(name: str, xs: list[Tensor], look: bool = False) -> list[Any]:
    torch.manual_seed(0)
    net, found = Net(PRODUCTS[name]).to(xs[0].device), []
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for k, x in enumerate(xs):
        x.grad = None
        out = net(x)
        if k == AT and look:
            assert out.grad_fn is not None
        loss = out.square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found += [loss.detach().clone(), x.grad]
    return [None if t is None else t.tolist() for t in (*found, *net.parameters())]


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("name", list(PRODUCTS))
def test_a_product_of_a_batch_of_three_dimensions_is_followed(name: str, where: str) -> None:
    xs = batches(BATCHES["as it is"], device_of(where))
    expected = train(name, xs)
    with graphs_of(where), kitsune.config.patch(gate=False), kitsune.accelerate(device=device_of(where)):
        assert train(name, xs) == expected
        assert kitsune.counters()["backwards_followed"] > STEPS // 2


@pytest.mark.parametrize("look", [False, True], ids=["unseen", "seen"])
@pytest.mark.parametrize("name", ["linear", "mm", "broadcast"])
@pytest.mark.parametrize("batch", list(BATCHES))
def test_another_batch_gives_what_it_gives_in_eager(batch: str, name: str, look: bool) -> None:
    """By plan, whose kernels read views where they say they are."""
    xs = batches(BATCHES[batch], "cpu")
    expected = train(name, xs, look)
    with graphs(), kitsune.config.patch(gate=False), kitsune.accelerate(device="cpu"):
        assert train(name, xs, look) == expected
        assert kitsune.counters()["backwards_followed"] > STEPS // 3


def test_a_batch_that_is_written_before_the_backward_is_told_as_in_eager() -> None:
    def errors(xs: list[Tensor]) -> list[Any]:
        torch.manual_seed(0)
        net, said = Net(F.linear), []
        for k, x in enumerate(xs):
            loss = net(x).square().sum()
            if k >= AT:
                x.add_(1)
            try:
                loss.backward()
            except RuntimeError as error:
                said.append(str(error).partition(":")[0])
        return [*said, *[p.grad.tolist() for p in net.parameters() if p.grad is not None]]

    xs = batches(BATCHES["as it is"], "cpu")
    expected = errors([x.clone() for x in xs])
    with kitsune.config.patch(gate=False), kitsune.accelerate(device="cpu"):
        assert errors(xs) == expected
    assert len(expected) == STEPS - AT + 4


def test_layers_that_are_frozen_are_followed() -> None:
    """Their weights are no leaves that collect gradients, and are seen as matrices all the same."""
    xs = batches(BATCHES["as it is"], "cpu")

    def frozen() -> list[Any]:
        torch.manual_seed(0)
        net = Net(F.linear)
        net.first.requires_grad_(False)
        # As adapters do, which are added to what is frozen.
        adapter, found = nn.Linear(8, 4), []
        for x in xs:
            net.zero_grad()
            h = F.linear(x, net.first.weight, net.first.bias) + adapter(x)
            loss = net.second(torch.tanh(h)).square().sum()
            loss.backward()
            found += [loss.item(), *[p.grad.tolist() for p in (*adapter.parameters(), *net.parameters()) if p.grad is not None]]
            adapter.zero_grad()
        return found

    expected = frozen()
    with kitsune.config.patch(gate=False), kitsune.accelerate(device="cpu"):
        assert frozen() == expected
    assert kitsune.counters()["backwards_followed"] > STEPS // 2


def test_a_batch_that_was_made_before_a_read_is_seen_as_a_matrix_too() -> None:
    def train() -> list[Any]:
        torch.manual_seed(0)
        net, found = Net(F.linear), []
        for _ in range(STEPS):
            x = torch.randn(3, 5, 8) * 2
            found.append(x.sum().item())
            net(x).square().sum().backward()
            found += [p.grad.tolist() for p in net.parameters() if p.grad is not None]
            net.zero_grad()
        return found

    expected = train()
    with kitsune.config.patch(gate=False), kitsune.accelerate(device="cpu"):
        assert train() == expected
    assert kitsune.counters()["backwards_followed"] > STEPS // 2


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("fused", [False, True], ids=["op by op", "fused"])
@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize("name", ["linear", "mm", "broadcast"])
def test_batches_cut_from_one_tensor_are_one_region(name: str, first: int, fused: bool, where: str) -> None:
    """Each begins elsewhere in its memory, which a view of it counts from: such views are made at once."""
    torch.manual_seed(0)
    device = device_of(where)
    data, net = torch.randn(3 * STEPS + 3, 5, 8).to(device), Net(PRODUCTS[name]).to(device)

    def train() -> list[Any]:
        found: list[Tensor] = []
        for k in range(STEPS):
            net.zero_grad()
            net(data[3 * k + first : 3 * k + first + 3]).square().sum().backward()
            found += [p.grad.clone() for p in net.parameters() if p.grad is not None]
            kitsune.flush()
        return [t.tolist() for t in found]

    expected = train()
    context = graphs() if fused and where == "replayed" else graphs_of(where)
    with context, kitsune.config.patch(gate=False, fuse=fused), kitsune.accelerate(device=device):
        found = train()
        counters = kitsune.counters()
    assert found == expected
    # What a backward views is made at once too, and where that begins in the memory of the batch is part of the region's key.
    assert counters["regions"] <= 2 or name == "mm"
