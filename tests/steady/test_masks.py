"""Parts of tensors by a mask, which torch counts on the host: read and set by the places that it names, or as a fill."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import kitsune
from kitsune.lazy import items
from kitsune.lazy.items import MANY

STEPS = 10
pytestmark = pytest.mark.usefixtures("repeatable")
COLUMNS = torch.tensor([True, False, True])
ROWS, EACH = torch.arange(8) % 3 > 0, torch.arange(24).view(8, 3) % 2 == 0


@pytest.fixture(params=[0, 1], ids=["warmup=0", "warmup=1"])
def kitsunes(request: pytest.FixtureRequest) -> Any:
    kitsune.reset()
    return lambda: kitsune.accelerate(device="cpu", warmup=request.param)


# What a loss is made of, from the outputs and the targets.
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "rows": lambda out, y: F.cross_entropy(out[ROWS], y[ROWS]),
    "losses": lambda out, y: F.cross_entropy(out, y, reduction="none")[ROWS].mean(),
    "elements": lambda out, y: out[EACH].square().mean(),
    "none": lambda out, y: out[ROWS & ~ROWS].sum() + out.square().mean(),
    "columns": lambda out, y: out[:, COLUMNS].square().mean(),
    "behind a number": lambda out, y: out[None, 3, COLUMNS].square().mean() + out.square().mean(),
    "a dimension more": lambda out, y: out[None, :, COLUMNS, None].square().mean(),
    "of what is given": lambda out, y: (out * (y.float() * 2)[ROWS].sum() + y[ROWS].sum()).square().mean(),
    "twice": lambda out, y: out[ROWS].mean() + out[~ROWS].square().mean(),
    "of the targets": lambda out, y: F.cross_entropy(out[y != 1], y[y != 1]),
    "set to rows": lambda out, y: (torch.zeros(8, 3).masked_fill(EACH, 1.0) * _set(out, ROWS, out[ROWS].tanh())).square().mean(),
    "filled": lambda out, y: (out * _set(torch.ones_like(out), EACH, 0.5)).square().mean(),
    "filled rows": lambda out, y: (out * _set(torch.ones_like(out), ROWS, 0)).square().mean(),
    "filled where it is small": lambda out, y: (out * _set(torch.ones_like(out), out.detach() < 0, 0.125)).square().mean(),
}
# Autograd's own name for it is that of the other way.
OTHERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "filled": lambda out, y: F.cross_entropy(_set(out, EACH, -1e9), y % 1),
    "filled rows": lambda out, y: F.cross_entropy(_set(out, ROWS, 0), y),
    "filled where it is small": lambda out, y: F.cross_entropy(_set(out, out.detach() < 0, 0.125), y),
}


def _set(out: Tensor, mask: Tensor, value: Any) -> Tensor:
    out = out * 1
    out[mask] = value
    return out


def train(loss_of: Callable[[Tensor, Tensor], Tensor], device: str = "cpu") -> list[Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    x, y, losses = torch.randn(8, 6).to(device), (torch.arange(8) % 3).to(device), list[Any]()
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [t.tolist() for t in (*losses, *model.parameters())]


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_with_a_mask_is_followed(name: str, kitsunes: Any) -> None:
    expected = train(LOSSES[name])
    with kitsune.config.patch(gate=False), kitsunes():
        assert train(LOSSES[name]) == expected
    assert kitsune.counters()["backwards_followed"] >= STEPS - 5, kitsune.explain()


@pytest.mark.parametrize("name", OTHERS)
def test_what_has_a_history_is_filled_as_in_eager(name: str, kitsunes: Any) -> None:
    expected = train(OTHERS[name])
    with kitsune.config.patch(gate=False), kitsunes():
        assert train(OTHERS[name]) == expected


def test_masks_that_name_another_number_each_time_are_left_to_torch(kitsunes: Any) -> None:
    """Or what comes before them would never be the same region twice."""
    n, masks = 0, [torch.arange(8) <= k for k in range(8)]

    def loss_of(out: Tensor, y: Tensor) -> Tensor:
        nonlocal n
        n += 1
        return out[masks[n % 8]].square().mean()

    def seen() -> list[Any]:
        nonlocal n
        n = 0
        return train(loss_of)

    expected = seen()
    with kitsune.config.patch(gate=False), kitsunes():
        assert seen() == expected
    passed = {line.op: line.count for line in kitsune.explain().passed_through}
    assert passed["aten.nonzero.default"] <= STEPS - 2 and passed["aten.index.Tensor"] >= STEPS - MANY - 4, passed


def test_a_large_mask_is_left_to_torch(kitsunes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its places would take many times its memory until the backward."""
    monkeypatch.setattr(items, "LARGE", EACH.numel() - 1)
    expected = {name: train(LOSSES[name]) for name in ("rows", "elements")}
    for name, followed in (("rows", True), ("elements", False)):
        kitsune.reset()
        with kitsune.config.patch(gate=False), kitsunes():
            assert train(LOSSES[name]) == expected[name]
        passed = {line.op for line in kitsune.explain().passed_through}
        assert ("aten.index.Tensor" not in passed) is followed
        assert bool(kitsune.counters()["backwards_followed"]) is followed


def test_a_mask_that_is_written_names_other_places(kitsunes: Any) -> None:
    masks = [torch.arange(8) % 3 == k for k in (0, 1)]

    def seen() -> list[Any]:
        mask, found = masks[0].clone(), []
        for k in range(STEPS):
            x = torch.arange(8.0) * 2
            found.append((x * 3)[mask].tolist())
            if k % 3 == 2:
                # Once unseen by any count of writes.
                (mask.data if k == 5 else mask).copy_(masks[k % 2])
        return found

    expected = seen()
    with kitsune.config.patch(gate=False), kitsunes():
        assert seen() == expected


@pytest.mark.parametrize("name", ["rows", "elements", "set to rows"])
def test_a_checkpoint_makes_again_what_it_has_kept(name: str, kitsunes: Any) -> None:
    """It counts what a forward keeps, and its recomputation goes by no lane."""

    def loss_of(out: Tensor, y: Tensor) -> Any:
        return checkpoint(LOSSES[name], out, y, use_reentrant=False)

    expected = train(loss_of)
    with kitsune.config.patch(gate=False), kitsunes():
        assert train(loss_of) == expected


def test_what_is_kept_for_the_backward_is_shown_as_in_eager(kitsunes: Any) -> None:
    shown: list[Any] = []

    def loss_of(out: Tensor, y: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: shown.append((t.shape, t.dtype)) or t, lambda t: t):
            return out[ROWS].square().mean()

    def seen() -> list[Any]:
        shown.clear()
        return [train(loss_of), *shown]

    expected = seen()
    with kitsune.config.patch(gate=False), kitsunes():
        assert seen() == expected


def test_a_mask_made_for_inference_is_not_kept(kitsunes: Any) -> None:
    def seen() -> list[str]:
        with torch.inference_mode():
            mask, found = torch.arange(8) > 2, list[str]()
        for _ in range(3):
            weight = nn.Parameter(torch.ones(8))
            with pytest.raises(RuntimeError, match="Inference tensors cannot be saved") as error:
                (weight * 2)[mask].sum().backward()
            found.append(str(error.value))
        return found

    expected = seen()
    with kitsune.config.patch(gate=False), kitsunes():
        assert seen() == expected


WRONG: dict[str, Any] = {
    "too short": torch.ones(5, dtype=torch.bool),
    "too many dimensions": torch.ones(8, 3, 1, dtype=torch.bool),
    "of the other dimension": torch.ones(3, dtype=torch.bool),
    "one": torch.tensor(True),
    "bytes": torch.ones(8, dtype=torch.uint8),
    "a list": [True, False] * 4,
    "two": (torch.ones(8, dtype=torch.bool), torch.ones(3, dtype=torch.bool)),
    "beside a list": (torch.ones(8, dtype=torch.bool), [0] * 8),
    "behind the others": (..., torch.ones(3, dtype=torch.bool)),
    "of the second dimension": (slice(None), torch.ones(8, dtype=torch.bool)),
    "behind too many": (0, 0, torch.ones(1, dtype=torch.bool)),
    "of rows": (slice(None, 4), torch.tensor([True, False, True])),
    "sparse": torch.eye(8, 3).to_sparse().bool(),
}


@pytest.mark.filterwarnings("ignore:indexing with dtype torch.uint8")
@pytest.mark.parametrize("mask", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("value", [None, 2.0, torch.ones(3)], ids=["read", "filled", "set"])
def test_what_is_no_mask_is_read_or_refused_as_in_eager(mask: Any, value: Any, kitsunes: Any) -> None:
    def seen() -> list[Any]:
        found: list[Any] = []
        for _ in range(3):
            x = torch.arange(24.0).view(8, 3) * 2
            try:
                if value is None:
                    found.append(x[mask].tolist())
                else:
                    x[mask] = value
            except (IndexError, RuntimeError, TypeError) as error:
                found.append((type(error), str(error)[:60]))
            found.append(x.tolist())
        return found

    expected = seen()
    with kitsune.config.patch(gate=False), kitsunes():
        assert seen() == expected


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["rows", "losses", "elements", "columns", "twice", "filled", "filled rows"])
def test_a_step_with_a_mask_is_a_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kitsune.reset()
    for mask in ("ROWS", "EACH", "COLUMNS"):
        monkeypatch.setitem(globals(), mask, globals()[mask].cuda())
    expected = train(LOSSES[name], "cuda")
    with kitsune.config.patch(gate=False, fuse=False), kitsune.accelerate(device="cuda"):
        assert train(LOSSES[name], "cuda") == expected
    counters = kitsune.counters()
    assert counters["replayed"] >= STEPS - 6 and not counters["graph_refused"], counters
