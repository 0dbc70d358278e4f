"""`kitsune.set_stance`: the words of torch.compiler.set_stance, as a call, a block and a decorator."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import kitsune
from kitsune import stance
from kitsune.lazy import LazyTensor


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    kitsune.reset()
    with kitsune.config.patch(device="cpu"):
        yield
    kitsune.set_stance("default")


def program(n: int = 3) -> torch.Tensor:
    return torch.ones(n).mul(2.0).add(1.0)


def seen_before() -> None:
    for _ in range(3):
        with kitsune.accelerate():
            program()


def test_words_are_torchs() -> None:
    for word in stance.STANCES:
        with torch.compiler.set_stance(word), kitsune.set_stance(word):
            assert stance._current == word


@pytest.mark.parametrize(("word", "hint"), [("force_eeger", "'force_eager'"), ("fail_on_recompiles", "'fail_on_recompile'")])
def test_other_words_are_refused_with_the_nearest(word: str, hint: str) -> None:
    with pytest.raises(ValueError, match=f"no stance '{word}'.*Did you mean {hint}"):
        kitsune.set_stance(word)
    assert stance._current == "default"


@pytest.mark.parametrize("bad", [None, 3, ["default"]])
def test_what_is_no_word_is_refused(bad: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        kitsune.set_stance(bad)


def test_decorating_what_is_no_function_is_refused_and_changes_nothing() -> None:
    with pytest.raises(TypeError, match="decorates functions"):
        kitsune.set_stance("force_eager")(3)
    assert stance._current == "default"


def test_as_a_call_it_stays() -> None:
    kitsune.set_stance("force_eager")
    with kitsune.accelerate():
        assert type(program()) is torch.Tensor
    kitsune.set_stance()
    with kitsune.accelerate():
        assert type(program()) is LazyTensor


def test_as_a_block_it_ends_with_the_block_also_on_an_error_and_in_another() -> None:
    with pytest.raises(KeyError), kitsune.set_stance("force_eager"):
        with kitsune.set_stance("fail_on_recompile"):
            assert stance._current == "fail_on_recompile"
        assert stance._current == "force_eager"
        raise KeyError
    assert stance._current == "default"


def test_a_block_can_be_entered_again() -> None:
    block = kitsune.set_stance("force_eager")
    for _ in range(2):
        with block:
            assert stance._current == "force_eager"
        assert stance._current == "default"


def test_as_a_decorator_it_holds_for_calls_alone() -> None:
    @kitsune.set_stance("force_eager")
    def now(depth: int = 1) -> list[str]:
        """What it says."""
        return [stance._current, *(now(depth - 1) if depth else [])]

    assert stance._current == "default"
    assert now() == ["force_eager", "force_eager"]
    assert (now.__name__, now.__doc__, stance._current) == ("now", "What it says.", "default")


def test_force_eager_in_the_middle_of_a_context_runs_what_is_pending_and_records_no_more() -> None:
    seen_before()
    with kitsune.accelerate():
        pending = program()
        with kitsune.set_stance("force_eager"):
            before = kitsune.counters()["recorded"]
            assert type(program()) is torch.Tensor
            assert torch.equal(pending, torch.full((3,), 3.0))
            assert kitsune.counters()["recorded"] == before
        assert type(program()) is LazyTensor


def test_force_eager_between_forward_and_backward_leaves_the_gradients_right() -> None:
    def gradients(word: str) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        optimizer = torch.optim.Adam(model.parameters())
        with kitsune.accelerate():
            for _ in range(5):
                loss = model(torch.ones(2, 3)).sum()
                with kitsune.set_stance(word):
                    optimizer.zero_grad()
                    loss.backward()
                optimizer.step()
        assert all(type(p.grad) is torch.Tensor for p in model.parameters())
        return [*model.parameters(), *(p.grad for p in model.parameters())]

    assert all(torch.equal(a, b) for a, b in zip(gradients("default"), gradients("force_eager"), strict=True))


def test_eager_on_recompile_follows_what_is_known_and_records_nothing_new() -> None:
    seen_before()
    before = kitsune.counters()
    with kitsune.set_stance("eager_on_recompile"), kitsune.accelerate():
        known, new = program(), program(4)
        assert type(known) is LazyTensor
        assert type(new) is torch.Tensor
        assert new.tolist() == [3.0] * 4
    after = kitsune.counters()
    assert after["recorded"] > before["recorded"]
    assert after["observed"] == before["observed"]
    assert after["passed_through"]["STANCE"] == 3
    assert after["regions"] == before["regions"]


@pytest.mark.parametrize("word", ["eager_on_recompile", "force_eager", "eager_then_compile"])
def test_a_training_with_new_steps_is_eagers_under_every_stance(word: str) -> None:
    def trained(accelerated: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
        optimizer = torch.optim.Adam(model.parameters())

        def step(n: int) -> None:
            optimizer.zero_grad()
            model(torch.ones(n, 3) * torch.arange(n)[:, None]).square().sum().backward()
            optimizer.step()

        with kitsune.set_stance("default" if accelerated else "force_eager"), kitsune.accelerate():
            for _ in range(4):
                step(4)
            with kitsune.set_stance(word):
                for n in (4, 5, 4, 6, 4):
                    step(n)
            step(4)
        return [*model.parameters(), *model.buffers(), torch.rand(2)]

    assert all(torch.equal(a, b) for a, b in zip(trained(False), trained(True), strict=True))


def test_fail_on_recompile_names_the_op_and_the_line() -> None:
    seen_before()
    with kitsune.set_stance("fail_on_recompile"), kitsune.accelerate():
        program()
        kitsune.flush()
        with pytest.raises(RuntimeError, match=rf"aten\.ones\.default at {__file__}:\d+ is not known at its place"):
            program(4)
        assert program().tolist() == [3.0] * 3


def test_the_gate_stands_still_under_a_stance() -> None:
    weight = torch.ones(2, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    with kitsune.config.patch(gate=True), kitsune.accelerate():
        with kitsune.set_stance("eager_on_recompile"):
            for _ in range(20):
                (weight * 2).sum().backward()
                optimizer.step()
        assert kitsune.counters()["gate_decided"] == {}
