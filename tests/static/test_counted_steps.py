"""Static functions whose optimizers count their steps on the host, as all of torch's do by default: Python is skipped, the counts
go on, and what follows from them moves as in eager."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kitsune
from kitsune.lazy.host_counts import MAX_DISTINCT
from tests.runtime.repeated import graphs
from tests.static.programs import Training, compare, dropping, meddling, straight
from tests.static.test_static import two_steps

# One call is observed and makes the state beside the region; then three are seen to be alike. What has changed costs up to six.
WARM, AGAIN = 4, 6
OPTIMIZERS = {
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "Adam, foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True, amsgrad=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, lr_decay=0.1),
    "Adagrad, foreach": lambda p: torch.optim.Adagrad(p, lr=0.01, lr_decay=0.1, foreach=True),
    "Adamax, foreach": lambda p: torch.optim.Adamax(p, lr=0.01, foreach=True),
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "RMSprop, foreach": lambda p: torch.optim.RMSprop(p, lr=0.01, foreach=True),
}
EACH = pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
adam = OPTIMIZERS["Adam"]


@pytest.fixture(autouse=True, params=["op by op", "replayed"])
def executor(request: pytest.FixtureRequest) -> Iterator[None]:
    kitsune.reset()
    if request.param == "replayed":
        with graphs(kernels=False):
            yield
    else:
        yield
    kitsune.reset()


def drive_with(n: int, before: Callable[[Training, int], Any]) -> Callable[[Training], None]:
    def drive(t: Training) -> None:
        for i in range(n):
            before(t, i)
            t.take(i)

    return drive


def counts_of(t: Training) -> list[Tensor]:
    return [state["step"] for state in t.optimizer.state.values()]


@EACH
def test_python_is_skipped(optimizer: Any) -> None:
    static, counters = compare(straight(30), at_most=WARM, optimizer=optimizer)
    assert not counters["static_refused"]
    assert [(float(count), count._version) for count in counts_of(static)] == [(30.0, 30)] * 6


@EACH
def test_a_schedule_moves_the_learning_rate_each_time(optimizer: Any) -> None:
    def halve(t: Training, i: int) -> None:
        t.optimizer.param_groups[0]["lr"] *= 0.9

    compare(drive_with(30, halve), at_most=WARM, optimizer=optimizer, model=dropping)


def test_a_learning_rate_that_moves_once_costs_one_call() -> None:
    def set_lr(t: Training) -> None:
        t.optimizer.param_groups[0]["lr"] = 0.3

    compare(meddling(set_lr, at=12, n=30), at_most=WARM + 1, at_least=WARM + 1, optimizer=adam)


def set_back(t: Training) -> None:
    for count in counts_of(t):
        count.fill_(2)


def one_set_back(t: Training) -> None:
    counts_of(t)[0].fill_(2)


def loaded(t: Training) -> None:
    state = t.optimizer.state_dict()
    state["state"][1]["step"] = torch.tensor(40.0)
    t.optimizer.load_state_dict(state)


def replaced(t: Training) -> None:
    next(iter(t.optimizer.state.values()))["step"] = torch.tensor(77.0)


@pytest.mark.parametrize("meddle", [set_back, one_set_back, loaded, replaced], ids=lambda f: f.__name__)
@pytest.mark.parametrize("optimizer", ["Adam", "AdamW, foreach", "Adagrad"])
def test_counts_that_somebody_changes(meddle: Any, optimizer: str) -> None:
    compare(meddling(meddle, at=12, n=30), at_most=WARM + AGAIN, optimizer=OPTIMIZERS[optimizer])


def test_parameters_that_join_later() -> None:
    def drive(t: Training) -> None:
        first, *_ = t.model
        for i in range(40):
            first.requires_grad_(i >= 15)
            t.take(i)

    static, _ = compare(drive, at_most=2 * (WARM + AGAIN), at_least=WARM, optimizer=adam)
    assert sorted(map(float, counts_of(static))) == [25.0, 25.0, 40.0, 40.0, 40.0, 40.0]


def test_more_different_counts_than_are_told_apart() -> None:
    """Then the update is none that is known, and Python makes it each time."""

    def spread(t: Training, i: int) -> None:
        if i == 1:
            for k, count in enumerate(counts_of(t)):
                count.fill_(10 * k)

    model = lambda: nn.Sequential(*[nn.Linear(6, 6, bias=False) for _ in range(MAX_DISTINCT + 1)], nn.Linear(6, 3))  # noqa: E731
    compare(drive_with(20, spread), at_most=20, at_least=20, model=model, optimizer=adam)


def test_two_steps_in_one_call() -> None:
    compare(straight(30), at_most=WARM + 2, body=two_steps, optimizer=adam)


def by_group(parameters: Any) -> torch.optim.Optimizer:
    first, *others = parameters
    return torch.optim.AdamW([{"params": [first], "lr": 0.03, "weight_decay": 0.0}, {"params": others}], lr=0.01)


def test_groups_with_options_of_their_own() -> None:
    def warm_up(t: Training, i: int) -> None:
        for k, group in enumerate(t.optimizer.param_groups):
            group["lr"] = (k + 1) * 0.001 * (i + 1)

    compare(drive_with(30, warm_up), at_most=WARM + 1, optimizer=by_group)


def counted_by_hand(t: Training, x: Tensor, y: Tensor) -> Tensor:
    """Beside what the optimizer counts."""
    t.optimizer.zero_grad()
    loss = F.cross_entropy(t.model(x), y)
    loss.backward()
    t.optimizer.step()
    for count in counts_of(t):
        count.add_(1)
    return loss.detach()


def test_counts_that_the_step_itself_changes() -> None:
    compare(straight(20), at_most=20, body=counted_by_hand, optimizer=adam)


def counted_before(t: Training) -> None:
    for count in counts_of(t):
        count.add_(1)


def halved_before(t: Training) -> None:
    for count in counts_of(t)[:2]:
        count.mul_(0.5)


def set_from_a_result(t: Training) -> None:
    for count in counts_of(t)[:1]:
        count.copy_(next(t.model.parameters()).detach().sum() * 0 + 3)


@pytest.mark.parametrize("change", [counted_before, halved_before, set_from_a_result], ids=lambda f: f.__name__)
@pytest.mark.parametrize("after", [False, True], ids=["before the update", "after it"])
@pytest.mark.parametrize("optimizer", ["Adam", "Adadelta"])
def test_the_step_changes_the_counts_itself(change: Any, after: bool, optimizer: str) -> None:
    """A call without Python reads them before all else, and counts after it."""

    def body(t: Training, x: Tensor, y: Tensor) -> Tensor:
        t.optimizer.zero_grad()
        loss = F.cross_entropy(t.model(x), y)
        loss.backward()
        if not after:
            change(t)
        t.optimizer.step()
        if after:
            change(t)
        return loss.detach()

    compare(straight(20), at_most=20, body=body, optimizer=OPTIMIZERS[optimizer])


@pytest.mark.parametrize("after", [False, True], ids=["before the update", "after it"])
def test_the_step_reads_the_counts_itself(after: bool) -> None:
    def body(t: Training, x: Tensor, y: Tensor) -> Any:
        copies = [] if after else [count + 0 for count in counts_of(t)]
        loss = Training.plain(t, x, y)
        return loss, [count + 0 for count in counts_of(t)] if after else copies

    _, counters = compare(straight(20), at_most=20, at_least=20, body=body, optimizer=adam)
    assert any("counted on the host" in reason for reason in counters["static_refused"]) == after


def one_for_two(t: Training) -> None:
    first, second, *_ = t.optimizer.state.values()
    first["step"] = second["step"]


def one_memory_for_two_groups(t: Training) -> None:
    first, *_, last = t.optimizer.state.values()
    first["step"] = last["step"].view(())


def one_buffer(t: Training) -> None:
    """Each count is an element of it, which none of the others shows."""
    numbers = torch.tensor([float(count) for count in counts_of(t)])
    for state, number in zip(t.optimizer.state.values(), numbers, strict=True):
        state["step"] = number


@pytest.mark.parametrize("meddle", [one_for_two, one_memory_for_two_groups, one_buffer], ids=lambda f: f.__name__)
@pytest.mark.parametrize("at", [1, 12])
def test_counts_that_are_one(meddle: Any, at: int) -> None:
    compare(meddling(meddle, at=at, n=30), at_most=30, optimizer=by_group)


def test_counts_in_one_buffer_that_come_to_be_one() -> None:
    def meddle(t: Training, i: int) -> None:
        if i == 6:
            one_buffer(t)
        if i == 17:
            first, *_, last = t.optimizer.state.values()
            first["step"] = last["step"].data

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        groups = [{"params": [p], "lr": 0.01 * (k + 1)} for k, p in enumerate(parameters)]
        return torch.optim.Adamax(groups, lr=1.0)

    compare(drive_with(40, meddle), at_most=40, optimizer=optimizer)


def swap_states(optimizer: Any) -> None:
    """The same pieces in the same order: only whose state it is has changed."""
    one, other = next((p, q) for p in optimizer.state for q in optimizer.state if p is not q and p.shape == q.shape)
    partner = {one: other, other: one}
    optimizer.state.update({partner.get(p, p): optimizer.state.pop(p) for p in list(optimizer.state)})


def rename_states(optimizer: Any) -> None:
    """The same again: only what the pieces are called has changed."""
    for state in optimizer.state.values():
        first, second = state.pop("exp_avg"), state.pop("exp_avg_sq")
        state["exp_avg_sq"], state["exp_avg"] = first.abs_(), second


@pytest.mark.parametrize("change", [swap_states, rename_states])
def test_state_that_is_another_parameters(change: Any) -> None:
    compare(meddling(lambda t: change(t.optimizer), at=12, n=30), at_most=WARM + AGAIN, at_least=WARM + 1, optimizer=adam)


def test_an_audit_finds_a_count_that_moved_otherwise() -> None:
    """A check in Python says that it did something else than was foretold, and not that all is well."""
    kitsune.reset()

    class Step:
        """Nobody looks at attributes of a class before a call."""

        skip = False

    def sometimes(t: Training, x: Tensor, y: Tensor) -> Tensor:
        loss = Training.plain(t, x, y)
        if Step.skip:
            t.optimizer.step()
        return loss

    training = Training(static=True, body=sometimes, optimizer=adam, audit=10)
    with pytest.raises(RuntimeError, match="did something else"):
        for i in range(40):
            Step.skip = i > 12
            training.take(i)
