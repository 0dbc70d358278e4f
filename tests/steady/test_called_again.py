"""Loops that call a model without gradients and read nothing: each call is a region that comes back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

import kitsune
from kitsune.lazy.step_ends import FEW, MANY

STEPS = 40
pytestmark = pytest.mark.usefixtures("repeatable")


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


def batches(device: str = "cpu") -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(8, 6, device=device) for _ in range(STEPS)]


def kept(model: nn.Module, xs: Any) -> list[Any]:
    return torch.cat([model(x).argmax(1) for x in xs]).tolist()


def summed(model: nn.Module, xs: Any) -> list[Any]:
    right = 0
    for x in xs:
        right = right + (model(x).argmax(1) == 0).sum()
    return [right.item()]  # type: ignore[union-attr]


def prepared(model: nn.Module, xs: Any) -> list[Any]:
    return torch.cat([model(((x.double() - 1) / 2).float()).softmax(1) for x in xs]).tolist()


LOOPS = {"kept": kept, "summed": summed, "prepared": prepared}
MODES: dict[str, Callable[[], Any]] = {"no_grad": torch.no_grad, "inference": torch.inference_mode}


@pytest.mark.parametrize("made", ["before", "inside"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LOOPS)
def test_each_call_comes_back(name: str, mode: str, made: str, kitsunes: Any) -> None:
    xs, model = batches(), mlp()
    with MODES[mode]():
        expected = LOOPS[name](model, xs)
    with kitsunes():
        model = mlp() if made == "inside" else model
        with MODES[mode]():
            assert LOOPS[name](model, xs) == expected
    counters = kitsune.counters()
    # What is made of a batch before its model is called does not tell that it is a new one.
    n_seen = 2 * MANY + 4 if name == "prepared" else 8
    # Of two, where the second one adds to what the first has left.
    n_ends = STEPS // MANY - 1 if name == "prepared" else STEPS // 2 - 4 if name == "summed" else STEPS - 8
    assert counters["flushed"]["AGAIN"] >= n_ends, counters["flushed"]
    n_each = counters["recorded"] + counters["observed"]
    assert counters["observed"] <= n_seen / STEPS * n_each, counters
    assert "a model is called again without gradients" in str(kitsune.explain())


def test_batches_may_be_results_of_before(kitsunes: Any) -> None:
    """As copies to a device are."""
    xs, model = batches(), mlp()
    with torch.no_grad():
        expected = kept(model, [x * 2 for x in xs])
    with kitsunes(), torch.no_grad():
        made = [x * 2 for x in xs]
        kitsune.flush()
        assert kept(model, made) == expected
    assert kitsune.counters()["flushed"]["AGAIN"] >= STEPS - 8


def test_batches_may_be_sparse_or_on_another_device(kitsunes: Any) -> None:
    """Nothing is recorded of these calls, and a sparse tensor has no storage to be asked for."""
    torch.manual_seed(0)
    weight, xs = nn.Parameter(torch.randn(6, 3)), [torch.randn(4, 6).relu().to_sparse() for _ in range(STEPS)]

    def products() -> list[Any]:
        found = [torch.mm(x, weight) for x in xs] + [torch.mm(x, weight).relu().sum(0) for x in xs]
        assert [torch.mm(x.to("meta"), weight.to("meta")).shape for x in batches()] == [(8, 3)] * STEPS
        return [one.tolist() for one in found]

    with torch.no_grad():
        expected = products()
    with kitsunes(), torch.no_grad():
        assert products() == expected


def test_parts_of_one_tensor_are_ends_less_often(kitsunes: Any) -> None:
    xs, model = torch.stack(batches()), mlp()
    with torch.no_grad():
        expected = kept(model, xs)
    with kitsunes(), torch.no_grad():
        assert kept(model, xs) == expected
    assert kitsune.counters()["flushed"]["AGAIN"] == STEPS // MANY - (STEPS % MANY == 0)


def test_a_model_that_is_a_loop_itself_is_one_region(kitsunes: Any) -> None:
    """Its cell has the same weights at each time, and each batch is read."""
    torch.manual_seed(0)
    cell, last, xs = nn.Linear(6 + 4, 4), nn.Linear(4, 3), [torch.randn(8, MANY - 2, 6) for _ in range(STEPS)]

    def looked_at() -> list[float]:
        found = []
        for x in xs:
            h = torch.zeros(8, 4)
            for k in range(x.shape[1]):
                h = cell(torch.cat([x[:, k], h], 1)).tanh()
            found.append(last(h).sum().item())
        return found

    with torch.no_grad():
        expected = looked_at()
    with kitsunes(), torch.no_grad():
        assert looked_at() == expected
    assert "AGAIN" not in kitsune.counters()["flushed"]


def test_a_weight_may_have_two_uses(kitsunes: Any) -> None:
    torch.manual_seed(0)
    embedding, tokens = nn.Embedding(12, 8), [torch.randint(0, 12, (4, 5)) for _ in range(STEPS)]
    others = [torch.randn(4, 5, 8) for _ in range(STEPS)]

    def calls() -> list[Any]:
        return torch.cat(
            [(embedding(x).sum() + linear(y, embedding.weight)).argmax(-1) for x, y in zip(tokens, others, strict=True)]
        ).tolist()

    with torch.no_grad():
        expected = calls()
    with kitsunes(), torch.no_grad():
        assert calls() == expected
    assert STEPS - 3 <= kitsune.counters()["flushed"]["AGAIN"] <= STEPS


@pytest.mark.parametrize("n_batches", [FEW, FEW + 2])
@pytest.mark.parametrize("where", ["before", "between", "behind"])
def test_a_teacher_in_a_step_does_not_end_it(where: str, n_batches: int, kitsunes: Any) -> None:
    """It is given as many batches of its own as a step may have; or more, and is found out to be one in the second step."""

    def trained() -> list[float]:
        torch.manual_seed(0)
        model, found = mlp(), list[Tensor]()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for k, x in enumerate(xs):

            def wanted(k: int = k) -> Tensor:
                with torch.no_grad():
                    return torch.stack([teacher(one) for one in others[n_batches * k : n_batches * (k + 1)]]).mean(0).softmax(-1)

            y = wanted() if where == "before" else None
            out = model(x)
            loss = cross_entropy(out, wanted() if y is None else y)
            loss.backward()  # type: ignore[no-untyped-call]
            if where == "behind":
                found.append(wanted().sum())
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.detach())
        return [one.item() for one in found]

    xs, others, teacher = batches(), [torch.randn(8, 6) for _ in range(n_batches * STEPS)], mlp()
    expected = trained()
    with kitsunes():
        assert trained() == expected
    counters = kitsune.counters()
    assert counters["backwards_followed"] >= STEPS - 6, counters
    if where != "before":
        assert counters["flushed"].get("AGAIN", 0) <= (n_batches > FEW) * 2 * n_batches, counters["flushed"]


def test_a_teacher_of_each_part_does_not_end_a_step_of_many(kitsunes: Any) -> None:
    def trained() -> list[float]:
        torch.manual_seed(0)
        model, found = mlp(), list[Tensor]()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for k in range(0, 2 * STEPS, n_parts):
            for x in xs[k : k + n_parts]:
                with torch.no_grad():
                    y = teacher(x).softmax(-1)
                loss = cross_entropy(model(x), y) / n_parts
                loss.backward()  # type: ignore[no-untyped-call]
                found.append(loss.detach())
            optimizer.step()
            optimizer.zero_grad()
        return [one.item() for one in found]

    n_parts, xs, teacher = 2 * FEW, [*batches(), *batches()], mlp()
    expected = trained()
    with kitsunes():
        assert trained() == expected
    counters = kitsune.counters()
    assert "AGAIN" not in counters["flushed"] and counters["backwards_followed"] >= 2 * STEPS - 3 * n_parts, counters


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_each_call_is_replayed(mode: str) -> None:
    xs, model = batches("cuda"), mlp().cuda()
    with MODES[mode]():
        expected = kept(model, xs)
    kitsune.reset()
    with kitsune.config.patch(gate=False, fuse=False), kitsune.accelerate(device="cuda"):
        with contextlib.ExitStack() as stack:
            stack.enter_context(MODES[mode]())
            assert kept(model, xs) == expected
        assert kitsune.counters()["replayed"] >= STEPS - 10
