"""A part of a tensor is set to a number: by a view and the number itself, not by a tensor on the CPU that torch makes of it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kitsune
from kitsune.pipeline import listeners

STEPS = 10
pytestmark = pytest.mark.usefixtures("repeatable")

INDICES: dict[str, Any] = {
    "a column": (slice(None), 0),
    "a row": 2,
    "the last": (Ellipsis, -1),
    "a block": (slice(1, 3), slice(0, 6, 2)),
    "from": slice(2, None),
    "a new dimension": (None, 1),
    "one number": (3, 4),
    "none": slice(4, 4),
    "all": slice(None),
    "all of it": Ellipsis,
    "both": (slice(None), slice(None)),
    "a list": [0, 2],
    "a mask": torch.arange(8) % 3 == 0,
    "a tensor": torch.tensor([1, 5]),
    "as far as a tensor says": slice(None, torch.tensor(3)),
    "too far": (slice(None), 12),
    "too many": (0, 0, 0),
}
VALUES = [0, 1.5, True, -0.0, float("nan"), float("-inf"), 3, 65504.1, 1e300, 2**70]
FOLLOWED = ["a column", "a row", "the last", "a block", "from", "a new dimension", "one number", "none"]
PLACES = ["a list", "a tensor"]


@pytest.fixture(params=[0, 1], ids=["warmup=0", "warmup=1"])
def kitsunes(request: pytest.FixtureRequest) -> Any:
    kitsune.reset()
    return lambda: kitsune.accelerate(device="cpu", warmup=request.param)


def bits(t: Tensor) -> Any:
    return t.dtype, t.double().view(torch.int64).tolist() if t.is_floating_point() else t.tolist()


def set_all(index: Any) -> list[Any]:
    found: list[Any] = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.bool, torch.int8, torch.int64):
        for value in VALUES:
            y = (torch.arange(64).view(8, 8) % 5).to(dtype)
            before = y._version
            try:
                y[index] = value
            except (RuntimeError, IndexError, ValueError) as error:
                found.append(str(error))
            found += [y._version - before, bits(y)]
    return found


@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
def test_every_number_by_every_index_is_as_in_eager(index: Any, kitsunes: Any) -> None:
    expected = set_all(index)
    with kitsune.config.patch(gate=False), kitsunes():
        for _ in range(3):
            assert set_all(index) == expected


def train(index: Any, device: str = "cpu") -> list[Any]:
    torch.manual_seed(0)
    first, head = nn.Linear(6, 8).to(device), nn.Linear(8, 3).to(device)
    optimizer = torch.optim.SGD([*first.parameters(), *head.parameters()], lr=0.1, momentum=0.9)
    x, y, losses = torch.randn(8, 6).to(device), (torch.arange(8) % 3).to(device), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        # What autograd has saved may not be written.
        h = first(x).tanh() * 1
        mask = torch.ones(8, 8, device=device)
        h[index] = 0.25
        mask[index] = 0
        loss = nn.functional.cross_entropy(head(h * mask), y)
        loss.backward()
        losses.append(loss.detach())
        optimizer.step()
    return [t.tolist() for t in (*losses, *first.parameters(), *head.parameters())]


@pytest.mark.parametrize("name", FOLLOWED)
def test_a_backward_through_what_was_set_is_followed(name: str, kitsunes: Any) -> None:
    expected = train(INDICES[name])
    graphs: list[Any] = []
    listeners.append(graphs.append)
    try:
        with kitsune.config.patch(gate=False), kitsunes():
            assert train(INDICES[name]) == expected
    finally:
        listeners.remove(graphs.append)
    assert kitsune.counters()["backwards_followed"] >= STEPS - 5, kitsune.explain()
    # A tensor of the number would come in each time.
    assert not [op for graph in graphs for op in graph.ops if op.target is torch.ops.aten.fill_.Tensor]


@pytest.mark.parametrize("index", [(slice(None), 0), [0, 2], 1], ids=str)
@pytest.mark.parametrize("whole", [True, False], ids=["whole numbers", "fractions"])
def test_numbers_that_count_up_make_no_new_regions(index: Any, whole: bool, kitsunes: Any) -> None:
    def counted() -> list[Any]:
        torch.manual_seed(0)
        layer, found = nn.Linear(8, 8), list[Any]()
        for k in range(30):
            layer.weight.grad = None
            times = torch.zeros(8, 8, dtype=torch.int64 if whole else torch.float32)
            times[index] = k if whole else k / 8
            (layer(times.float()) ** 2).sum().backward()
            assert layer.weight.grad is not None
            found += [times.tolist(), layer.weight.grad.tolist()]
        return found

    expected = counted()
    with kitsune.config.patch(gate=False), kitsunes():
        assert counted() == expected
        before = kitsune.counters()["observed"]
        assert counted() == expected and kitsune.counters()["observed"] == before
    assert kitsune.counters()["backwards_followed"] >= 40, kitsune.explain()


@pytest.mark.parametrize("name", PLACES)
def test_a_backward_through_what_was_set_at_places_is_followed(name: str) -> None:
    expected = train(INDICES[name])
    kitsune.reset()
    with kitsune.config.patch(gate=False), kitsune.accelerate(device="cpu"):
        assert train(INDICES[name]) == expected
    assert kitsune.counters()["backwards_followed"] >= STEPS - 2, kitsune.explain()


@pytest.mark.gpu
@pytest.mark.parametrize("name", FOLLOWED + PLACES)
def test_a_step_that_sets_a_part_is_a_graph(name: str) -> None:
    kitsune.reset()
    expected = train(INDICES[name], "cuda")
    with kitsune.config.patch(gate=False, fuse=False), kitsune.accelerate(device="cuda"):
        assert train(INDICES[name], "cuda") == expected
    counters = kitsune.counters()
    assert counters["replayed"] >= STEPS - 6 and not counters["graph_refused"], counters


def test_a_leaf_may_be_written_without_gradients(kitsunes: Any) -> None:
    def padded() -> list[Any]:
        torch.manual_seed(0)
        table = nn.Embedding(5, 3)
        optimizer = torch.optim.SGD(table.parameters(), lr=0.1)
        for k in range(STEPS):
            optimizer.zero_grad()
            table(torch.tensor([0, 1, 2, k % 5])).square().sum().backward()
            optimizer.step()
            with torch.no_grad():
                table.weight[0] = 0
        return table.weight.tolist()

    expected = padded()
    with kitsune.config.patch(gate=False), kitsunes():
        assert padded() == expected


def test_a_leaf_that_may_not_be_written_is_refused_in_torchs_words(kitsunes: Any) -> None:
    def refused() -> list[str]:
        found = []
        # The second one is made where results are recorded.
        for leaf in (nn.Parameter(torch.zeros(3, 3)), torch.zeros(3, 3).add(1).requires_grad_()):
            with pytest.raises(RuntimeError) as error:
                leaf[:, 0] = 1
            found.append(str(error.value))
        return found

    expected = refused()
    with kitsunes():
        assert refused() == expected


# What torch says of them, and what it does, is not what it says of a view that is filled.
ODD: dict[str, Callable[[], Tensor]] = {
    "no sign": lambda: (torch.arange(6).view(2, 3) * 1.0).to(torch.float8_e8m0fnu),
    "no infinity": lambda: (torch.arange(6).view(2, 3) * 1.0).to(torch.float8_e4m3fn),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
}


@pytest.mark.parametrize("make", ODD.values(), ids=ODD)
def test_a_tensor_of_another_kind_is_set_or_refused_as_torch_does(make: Callable[[], Tensor], kitsunes: Any) -> None:
    def set_row() -> list[Any]:
        found: list[Any] = []
        for value in VALUES:
            tensor = make()
            try:
                tensor[0] = value
            except (RuntimeError, TypeError, ValueError) as error:
                found.append((type(error), str(error)))
            if not tensor.is_nested:
                found.append(tensor.to_dense().float().nan_to_num(7.5).tolist())
        return found

    expected = set_row()
    with kitsune.config.patch(gate=False), kitsunes():
        for _ in range(3):
            assert set_row() == expected


def test_what_has_one_place_for_several_numbers_is_refused_and_has_its_gradient(kitsunes: Any) -> None:
    def refused() -> list[Any]:
        torch.manual_seed(0)
        layer, found = nn.Linear(6, 12), list[Any]()
        for _ in range(4):
            layer.weight.grad = None
            h = layer(torch.ones(8, 6))[:, :1].expand(8, 3)
            with pytest.raises(RuntimeError) as error:
                h[0] = 0
            h.sum().backward()
            assert layer.weight.grad is not None
            found += [str(error.value), layer.weight.grad.tolist()]
        return found

    expected = refused()
    with kitsune.config.patch(gate=False), kitsunes():
        assert refused() == expected


def test_a_leaf_that_is_written_before_a_step_keeps_its_backward_followed(kitsunes: Any) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 12), torch.randn(8, 6)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with kitsune.config.patch(gate=False), kitsunes():
        for _ in range(STEPS):
            optimizer.zero_grad()
            with torch.no_grad():
                layer.weight[0] = 0
                layer.bias[1:3] = 0.5
            layer(x).square().mean().backward()
            optimizer.step()
    assert kitsune.counters()["backwards_followed"] >= STEPS - 5, kitsune.explain()


@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
def test_what_was_set_has_the_history_that_it_has_in_eager(index: Any, kitsunes: Any) -> None:
    def histories() -> list[Any]:
        torch.manual_seed(0)
        layer, found = nn.Linear(6, 8), list[Any]()
        for _ in range(5):
            h = layer(torch.ones(8, 6)) * 2
            try:
                h[index] = 0.25
            except IndexError:
                continue
            found.append(type(h.grad_fn).__name__)
            found += [grad.tolist() for grad in torch.autograd.grad(h.square().sum(), [layer.weight])]
        return found

    expected = histories()
    with kitsune.config.patch(gate=False), kitsunes():
        assert histories() == expected


def test_what_was_made_in_inference_mode_may_be_set_there(kitsunes: Any) -> None:
    def train_beside() -> list[float]:
        torch.manual_seed(0)
        layer, losses = nn.Linear(6, 8), []
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        for _ in range(STEPS):
            optimizer.zero_grad()
            with torch.inference_mode():
                y = torch.ones(4, 8)
                y[0] = 1.5
                y[:, 1:3][0] = 2
            loss = (layer(torch.ones(4, 6)) * y.sum().item()).square().mean() / 1e6
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    expected = train_beside()
    with kitsune.config.patch(gate=False), kitsunes():
        assert train_beside() == expected
    assert kitsune.counters()["backwards_followed"] >= STEPS - 5


def test_a_reset_lets_go_of_the_tensors_of_lists_and_numbers(kitsunes: Any) -> None:
    def tensors() -> set[int]:
        gc.collect()
        return {id(t) for t in gc.get_objects() if type(t) is Tensor}

    x, before = torch.ones(8, 6), tensors()
    before.add(id(x))
    with kitsune.config.patch(gate=False), kitsunes():
        for _ in range(STEPS):
            y = x * 2
            y[:, [0, 2]] = 3
            kitsune.flush()
        del y
        kitsune.flush()
    assert tensors() - before
    kitsune.reset()
    assert not tensors() - before
