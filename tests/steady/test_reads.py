"""A read of one number goes to the recorder past torch's dispatcher: what it gives, refuses and shows is as in eager."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode, _push_mode

import kitsune
from kitsune.lazy.early_reads import EarlyReads
from tests.runtime.repeated import graphs

pytestmark = pytest.mark.usefixtures("repeatable")
READS: dict[str, Callable[[Any], Any]] = {
    "item": torch.Tensor.item,
    "bool": bool,
    "float": float,
    "int": int,
    "item of a sum": lambda x: x.sum().item(),
    "bool of a sum": lambda x: bool(x.sum()),
    "float of a sum": lambda x: float(x.sum()),
}
XS = list(torch.randn(12, 4, 4, generator=torch.Generator().manual_seed(1)))
VALUES = {
    "numbers": lambda k: torch.tensor(k - 2.5),
    "no number": lambda k: torch.tensor(float("nan") * k),
    "zeros": lambda k: torch.tensor(-0.0 * k),
    "half": lambda k: torch.tensor([0.3 * k], dtype=torch.bfloat16),
    "whole": lambda k: torch.tensor([[k - 3]]),
    "complex": lambda k: torch.tensor(complex(k, k % 2)),
    "small": lambda k: torch.tensor(k, dtype=torch.uint8),
    "true": lambda k: torch.tensor(k % 2 == 0),
    "two": lambda k: torch.tensor([1.0, k]),
}


def answered(read: Callable[[Any], Any], value: Callable[[int], torch.Tensor]) -> list[Any]:
    found: list[Any] = []
    for k in range(6):
        try:
            number = read(value(k) * 1)
            found.append((type(number), repr(number)))
        except (RuntimeError, TypeError, ValueError, OverflowError) as error:
            found.append((type(error), str(error)))
    return found


@pytest.mark.parametrize("value", VALUES.values(), ids=list(VALUES))
def test_each_read_gives_and_refuses_what_eager_does(value: Callable[[int], torch.Tensor]) -> None:
    expected = [answered(read, value) for read in READS.values()]
    with kitsune.accelerate(device="cpu"):
        assert [answered(read, value) for read in READS.values()] == expected


class Names(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_mode_that_came_unseen_is_shown_the_read() -> None:
    with kitsune.accelerate(device="cpu"):
        for k in range(4):
            y = (torch.ones(3) * k).sum()
            mode = Names()
            if k == 3:
                _push_mode(mode)
            try:
                assert bool(y > 1) == (k > 0)
            finally:
                if k == 3:
                    _pop_mode()
    assert "aten._local_scalar_dense.default" in mode.seen


def test_a_profiler_sees_the_reads() -> None:
    def events(k: int) -> int:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            (torch.ones(3) * k).sum().item()
        return sum(event.name == "aten::item" for event in profile.events())

    with kitsune.accelerate(device="cpu"):
        assert [events(k) for k in range(4)] == [1] * 4


def test_a_number_with_a_history_keeps_it() -> None:
    def gradients() -> list[Any]:
        x, found = torch.ones(3, requires_grad=True), []
        for k in range(6):
            y = (x * k).square().sum()
            found.append(y.item())
            y.backward()
            found.append(x.grad.tolist())  # type: ignore[union-attr]
        return found

    expected = gradients()
    with kitsune.accelerate(device="cpu"):
        assert gradients() == expected


@pytest.fixture
def made_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What second questions were given that needed no region."""
    found: list[Any] = []
    original = EarlyReads.made_before

    def told(self: EarlyReads, *args: Any) -> Any:
        result = original(self, *args)
        found.extend([] if result is None else [1])
        return result

    monkeypatch.setattr(EarlyReads, "made_before", told)
    yield found


def questions(second: Callable[[torch.Tensor, int], Any]) -> list[Any]:
    """Two questions about a sum in each step, before work that is worth sending the first ahead of."""
    found: list[Any] = []
    for k, x in enumerate(XS):
        y, rest = x.abs().sum(), x
        for _ in range(12):
            rest = torch.tanh(rest @ rest)
        found.append(bool(y > 12.0))
        found.append(second(y, k))
        found.append(rest.sum().item())
    return found


def kept(y: torch.Tensor, k: int) -> Any:
    asked = y > 13
    bool(asked)
    return asked


def used(y: torch.Tensor, k: int) -> Any:
    asked = y > 13
    return bool(asked) if k < 8 else (asked * 2 + 1).item()


def test_a_second_answer_that_is_held_is_moved(made_before: list[Any]) -> None:
    expected = [x if type(x) in (bool, float) else x.item() for x in questions(kept)]
    with graphs(kernels=False), kitsune.accelerate(device="cpu"):
        found = questions(kept)
        assert [x if type(x) in (bool, float) else x.item() for x in found] == expected
    assert len(made_before) >= 5


def test_a_second_answer_may_become_more_than_a_number(made_before: list[Any]) -> None:
    expected = questions(used)
    with graphs(kernels=False), kitsune.accelerate(device="cpu"):
        assert questions(used) == expected
    assert made_before


def test_a_second_question_about_what_came_from_outside(made_before: list[Any]) -> None:
    outside = [torch.tensor(10.0 + k) for k in range(len(XS))]

    def other(y: torch.Tensor, k: int) -> Any:
        return bool((y if k < 8 or k % 2 else outside[k]) > 13)

    expected = questions(other)
    with graphs(kernels=False), kitsune.accelerate(device="cpu"):
        assert questions(other) == expected
    assert made_before


def test_a_second_question_with_a_history_has_its_own_region(made_before: list[Any]) -> None:
    def gradients() -> list[Any]:
        weight, found = torch.ones(4, 4, requires_grad=True), []
        for x in XS:
            y = (x * weight).abs().sum()
            z = y.detach().requires_grad_()
            found.append(bool(y.detach() > 12.0))
            w = z * 3
            found.append(w.item())
            (w * y).backward()
            found += [z.grad.item(), weight.grad.tolist()]  # type: ignore[union-attr]
        return found

    expected = gradients()
    with graphs(kernels=False), kitsune.accelerate(device="cpu"):
        assert gradients() == expected
    assert not made_before
