"""Updates of optimizers that count their steps on the host are followed as one call, as those of any other are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kitsune
from kitsune.lazy.host_counts import numbers_of
from kitsune.lazy.update_matchers import UpdateMatcher
from tests.static.test_counted_steps import EACH, rename_states, swap_states

STEPS = 20
# In so many steps the optimizer's state, its first numbers and those that move are learned.
LEARNING = 3
Meddle = Callable[[torch.optim.Optimizer, int], Any]


@pytest.fixture
def matched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Of each look at a matcher, whether it took the call."""
    found: list[bool] = []
    match = UpdateMatcher.match

    def counting(self: UpdateMatcher, *args: Any) -> Any:
        taken = match(self, *args)
        found.append(taken is not None)
        return taken

    monkeypatch.setattr(UpdateMatcher, "match", counting)
    kitsune.reset()
    with kitsune.config.patch(gate=False):
        yield found
    kitsune.reset()


def nothing(*ignored: Any) -> None:
    pass


def train(optimizer: Any, device: str, meddle: Meddle, extra: Callable[[], Any] = list) -> list[Tensor]:
    """Everything that an optimizer has left; `extra` makes parameters besides those of the model."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).to(device)
    factors: list[Tensor] = extra()
    chosen = optimizer([*model.parameters(), *factors])
    xs = torch.randn(STEPS, 3, 4).to(device)
    for i in range(STEPS):
        meddle(chosen, i)
        chosen.zero_grad()
        out = model(xs[i])
        for factor in factors:
            out = out * factor
        out.square().mean().backward()
        chosen.step()
    state = [t for of_one in chosen.state.values() for t in of_one.values() if isinstance(t, Tensor)]
    # How often each was written, too. (Of lists that are written on a GPU some versions of torch do not count all.)
    counted = [*model.parameters(), *factors, *(of_one["step"] for of_one in chosen.state.values())]
    return [*model.parameters(), *factors, *state, *(torch.tensor(t._version) for t in counted)]


def assert_same(optimizer: Any, meddle: Meddle = nothing, device: str = "cpu", **options: Any) -> None:
    expected = train(optimizer, device, meddle, **options)
    with kitsune.accelerate(device=device):
        got = train(optimizer, device, meddle, **options)
    assert len(expected) == len(got)
    for a, b in zip(expected, got, strict=True):
        assert torch.equal(a, b.detach())


@EACH
def test_an_update_is_one_call_and_is_told_by_its_lists(optimizer: Any, matched: list[bool]) -> None:
    assert_same(optimizer)
    assert kitsune.counters()["updates_followed"] >= STEPS - LEARNING
    assert sum(matched) >= STEPS - LEARNING - 2


@EACH
def test_a_learning_rate_that_moves(optimizer: Any, matched: list[bool]) -> None:
    def fall(chosen: Any, i: int) -> None:
        chosen.param_groups[0]["lr"] *= 0.8

    assert_same(optimizer, fall)
    assert kitsune.counters()["updates_followed"] >= STEPS - LEARNING and sum(matched) >= STEPS - LEARNING - 2


@pytest.mark.parametrize("which", [slice(0, 1), slice(1, 3), slice(None)], ids=["one", "two", "all"])
def test_counts_that_somebody_sets(which: slice, matched: list[bool]) -> None:
    """The corrections follow from the counts as they are, and which parameters have the same count may change."""

    def set_counts(chosen: Any, i: int) -> None:
        if i in (8, 15):
            for state in list(chosen.state.values())[which]:
                state["step"].fill_(30 + i)

    assert_same(lambda p: torch.optim.Adam(p, lr=0.01), set_counts)
    assert (sum(matched) >= 5 and not all(matched[5:])) or which == slice(None)


@pytest.mark.parametrize(
    "number", [0.1, 2**24 - 1, 2**24, math.inf, torch.tensor(7), torch.tensor(2047.0, dtype=torch.float16)], ids=repr
)
@pytest.mark.parametrize("name", ["Adam", "RMSprop", "Adagrad"])
def test_counts_that_are_no_numbers_of_steps(name: str, number: Any, matched: list[bool]) -> None:
    """A float counts up to 2^24 in ones; halves, fractions and integers are counted otherwise, and so torch counts them."""

    def set_counts(chosen: Any, i: int) -> None:
        for state in chosen.state.values() if i == 10 else ():
            state["step"] = number.clone() if isinstance(number, Tensor) else torch.tensor(float(number))

    assert_same(lambda p: getattr(torch.optim, name)(p, lr=0.01, **{"lr_decay": 0.1} if name == "Adagrad" else {}), set_counts)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "Adagrad"])
def test_a_fused_update_counts_by_itself(name: str, matched: list[bool]) -> None:
    assert_same(lambda p: getattr(torch.optim, name)(p, lr=0.01, fused=True))


def test_a_count_that_a_step_does_not_move() -> None:
    """From 2^24 on one more is none in single precision; what follows from the last number before it is as torch has it."""
    options = {"lr": 0.1, "lr_decay": 0.1}
    count = torch.tensor(2.0**24 - 1) + 1
    assert numbers_of("adagrad", [2.0**24 - 1], options) == [0.1 / (1 + (count.item() - 1) * 0.1)]
    assert (count + 1).item() == count.item() and numbers_of("adagrad", [count.item()], options) is None


def test_counts_in_double_precision(matched: list[bool]) -> None:
    def set_counts(chosen: Any, i: int) -> None:
        for state in chosen.state.values() if i == 1 else ():
            state["step"] = state["step"].double()

    assert_same(lambda p: torch.optim.Adam(p, lr=0.01), set_counts)
    assert sum(matched) >= STEPS - LEARNING - 4


@pytest.mark.parametrize("change", [swap_states, rename_states])
def test_state_that_is_another_parameters(change: Any, matched: list[bool]) -> None:
    """Of the pieces themselves and of their order nothing has changed."""

    def factor() -> list[Tensor]:
        return [nn.Parameter(torch.tensor([1.5, 0.5]))]

    assert_same(lambda p: torch.optim.Adam(p, lr=0.01), lambda chosen, i: i == 12 and change(chosen), extra=factor)
    assert any(matched)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "foreach"])
def test_a_piece_of_state_that_lies_otherwise_from_then_on(fused: bool, matched: list[bool]) -> None:
    """Its lists are filled anew, and it is no longer the call that the matcher knows. (One that dies others would miss.)"""
    kept: list[Tensor] = []
    # Made outside of a context, for either world.
    spare = [torch.zeros(4, 5).t() for _ in range(2)]

    def lie_otherwise(chosen: Any, i: int) -> None:
        if i == 10:
            state = next(iter(chosen.state.values()))
            kept.append(state["exp_avg"])
            state["exp_avg"] = spare.pop()

    assert_same(lambda p: torch.optim.Adam(p, lr=0.01, fused=fused or None, foreach=None if fused else True), lie_otherwise)
    assert sum(matched) >= 10 and not all(matched)


@pytest.mark.parametrize("name", ["Adam", "RMSprop", "Adagrad"])
def test_a_learning_rate_that_is_a_tensor(name: str) -> None:
    """Its number is read on the host, and is none of the counts."""
    rate = torch.tensor(0.01)

    def fill(chosen: Any, i: int) -> None:
        rate.fill_(0.01 if i < 10 else 0.2)

    kitsune.reset()
    with kitsune.config.patch(gate=False):
        assert_same(lambda p: getattr(torch.optim, name)(p, lr=rate), fill)
    kitsune.reset()


@EACH
def test_counts_that_somebody_has_copied_and_not_looked_at_yet(optimizer: Any, matched: list[bool]) -> None:
    """The copy is made before the next step is counted."""

    def copies() -> list[Tensor]:
        found: list[Tensor] = []

        def copy(chosen: Any, i: int) -> None:
            # After some steps that are known without it.
            if i > 8:
                found.extend(state["step"].clone() for state in list(chosen.state.values())[:2])

        train(optimizer, "cpu", copy)
        return found

    expected = copies()
    with kitsune.accelerate():
        got = copies()
    assert [float(t) for t in got] == [float(t) for t in expected] == [i for i in range(9, STEPS) for _ in range(2)]


@pytest.mark.gpu
@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("name", ["Adam", "RMSprop"])
def test_a_number_on_the_host_is_a_parameter_beside_those_of_the_gpu(name: str, foreach: bool) -> None:
    """What is done to it is not recorded, and is none of the counting."""

    def factor() -> list[Tensor]:
        return [nn.Parameter(torch.tensor(1.5))]

    kitsune.reset()
    with kitsune.config.patch(gate=False, fuse=False):
        assert_same(lambda p: getattr(torch.optim, name)(p, lr=0.01, foreach=foreach), device="cuda", extra=factor)
    kitsune.reset()


@pytest.mark.gpu
@EACH
def test_an_update_is_one_call_on_a_gpu(optimizer: Any, matched: list[bool]) -> None:
    with kitsune.config.patch(fuse=False):
        assert_same(optimizer, device="cuda")
    assert kitsune.counters()["updates_followed"] >= STEPS - LEARNING and sum(matched) >= STEPS - LEARNING - 2
