"""What keeps a function's Python from being skipped, what a violated audit says, and which options are refused."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import kitsune
from kitsune.static import function
from tests.static.programs import Training, compare, dropping, straight

WARM = 5


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    kitsune.reset()
    yield
    kitsune.reset()


def loss_of(t: Training, x: Tensor, y: Tensor) -> Tensor:
    t.optimizer.zero_grad()
    return F.cross_entropy(t.model(x), y)


def update(t: Training, loss: Tensor) -> Tensor:
    loss.backward()
    t.optimizer.step()
    return loss.detach()


def reads_a_number(t: Training, x: Tensor, y: Tensor) -> float:
    return update(t, loss_of(t, x, y)).item()


def decides_by_value(t: Training, x: Tensor, y: Tensor) -> Tensor:
    loss = loss_of(t, x, y)
    return update(t, loss * 2 if loss > 1.5 else loss)


def reads_memory(t: Training, x: Tensor, y: Tensor) -> list[float]:
    update(t, loss_of(t, x, y))
    return x.tolist()[0]


def reads_random_state(t: Training, x: Tensor, y: Tensor) -> Tensor:
    hidden = checkpoint(t.model, x, use_reentrant=False)
    t.optimizer.zero_grad()
    return update(t, F.cross_entropy(hidden, y))


def seeds(t: Training, x: Tensor, y: Tensor) -> Tensor:
    torch.manual_seed(3)
    return update(t, loss_of(t, x, y))


def keeps_the_graph(t: Training, x: Tensor, y: Tensor) -> Tensor:
    return t.model(x)


def draws_in_python(t: Training, x: Tensor, y: Tensor) -> Tensor:
    return update(t, loss_of(t, x, y) * random.random())


def returns_an_object(t: Training, x: Tensor, y: Tensor) -> Any:
    return t.kept if update(t, loss_of(t, x, y)) is None else Result()


def counts_in_its_result(t: Training, x: Tensor, y: Tensor) -> Any:
    return update(t, loss_of(t, x, y)), len(t.kept)


def uses_a_subclass(t: Training, x: Tensor, y: Tensor) -> Tensor:
    return update(t, loss_of(t, x, y) + t.model[0].weight.detach().to_sparse().to_dense().sum())


def makes_a_tensor_of_python(t: Training, x: Tensor, y: Tensor) -> Tensor:
    return update(t, loss_of(t, x, y) * torch.tensor([0.5, 0.25]).sum())


def steps_its_scheduler(t: Training, x: Tensor, y: Tensor) -> Tensor:
    loss = update(t, loss_of(t, x, y))
    t.optimizer.param_groups[0]["lr"] *= 0.9
    return loss


def switches_off(t: Training, x: Tensor, y: Tensor) -> Tensor:
    with kitsune.disable():
        return update(t, loss_of(t, x, y))


def alternates(t: Training, x: Tensor, y: Tensor) -> Tensor:
    loss = loss_of(t, x, y)
    return update(t, loss * 2 if len(t.kept) % 2 else loss.sin())


class Result:
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


REFUSED = {
    reads_a_number: "became a Python number",
    decides_by_value: "became a Python number",
    reads_memory: "asked for a tensor's memory",
    reads_random_state: "random generator was read or set",
    seeds: "random generator was read or set",
    keeps_the_graph: "let it return `.detach()`",
    draws_in_python: "takes a number that changes",
    returns_an_object: "it returns a Result; let it return tensors",
    counts_in_its_result: "it returned something else",
    uses_a_subclass: "is not recorded",
    makes_a_tensor_of_python: "was found in no module, optimizer or variable",
    steps_its_scheduler: "let a scheduler step outside of it",
    switches_off: "kitsune.disable",
    alternates: "did something else with arguments of the same kind: operator",
}


@pytest.mark.parametrize("body", REFUSED, ids=lambda f: f.__name__)
def test_what_needs_its_python_keeps_it(body: Callable[..., Any]) -> None:
    def drive(t: Training) -> None:
        random.seed(4)
        straight(14)(t)

    compare(drive, at_most=14, at_least=14, body=body)
    said = str(kitsune.explain())
    assert REFUSED[body] in said, said
    assert "Training.__init__.<locals>.whole" in said


@pytest.mark.parametrize("foreach", [True, False], ids=["foreach", "one by one"])
@pytest.mark.parametrize("optimizer", [torch.optim.NAdam, torch.optim.RAdam], ids=lambda c: c.__name__)
def test_corrections_that_python_computes_keep_it(optimizer: Any, foreach: bool) -> None:
    compare(straight(14), at_most=14, optimizer=lambda p: optimizer(p, lr=0.01, foreach=foreach))
    counters = kitsune.counters()
    assert counters["static_skipped"] == 0 and "This is a bug" not in str(counters["static_refused"])


def test_a_number_that_moved_once_has_to_be_seen_more_often() -> None:
    weights = [0.5] * 3 + [0.25] * 5 + [0.75] * 40

    def body(t: Training, x: Tensor, y: Tensor) -> Tensor:
        return update(t, loss_of(t, x, y) * weights[t.n_python - 1])

    t = Training(static=True, body=body)
    straight(40)(t)
    # Three alike would be enough. Here the fourth and the ninth call have another number than the one before: twelve have to be.
    assert t.n_python == 8 + 12


def test_an_argument_that_is_no_tensor_we_know() -> None:
    class Own(Tensor):
        pass

    @kitsune.accelerate(static=True, device="cpu")
    def double(x: Any) -> Any:
        return x * 2

    for _ in range(8):
        assert double(torch.ones(2).as_subclass(Own)).tolist() == [2.0, 2.0]
        assert double(torch.ones(2, 2).to_sparse()).to_dense().tolist() == [[2.0, 2.0]] * 2
    assert "argument is a tensor of another library" in str(kitsune.explain())


def test_an_argument_that_is_a_parameter() -> None:
    model = torch.nn.Linear(3, 3)

    @kitsune.accelerate(static=True, device="cpu")
    def both(w: Tensor) -> Tensor:
        return (model(w) * w).detach()

    with torch.no_grad():
        others = [torch.randn(3, 3) for _ in range(10)]
        for w in [*others, *[model.weight.detach()] * 6, *others]:
            assert torch.equal(both(w), (model(w) * w).detach())
    assert kitsune.counters()["static_skipped"] > 10
    assert "an argument shares memory with a parameter" in str(kitsune.explain())


def test_a_function_that_is_never_learned_is_watched_rarely_and_left_to_the_gate() -> None:
    with kitsune.config.patch(gate=True):
        compare(straight(40), at_most=40, at_least=40, body=reads_a_number)
    counters = kitsune.counters()
    assert sum(counters["static_refused"].values()) < 20
    assert counters["gate_left"] > 5


def test_an_audit_that_finds_nothing_goes_on() -> None:
    _, counters = compare(straight(40), at_most=WARM + 5, audit=8, model=dropping)
    # 35 calls are known, and each eighth of them is checked.
    assert counters["static_audits"] == 4 and counters["static_skipped"] == 40 - WARM - 4
    assert "31 calls without their Python, 4 audits" in str(kitsune.explain())


def test_the_knob_says_how_often() -> None:
    with kitsune.config.patch(audit=5):
        _, counters = compare(straight(25), at_most=WARM + 4)
    assert counters["static_audits"] == 4
    with kitsune.config.patch(audit=0):
        _, counters = compare(straight(25), at_most=WARM)
    assert counters["static_audits"] == 0


@pytest.mark.parametrize(("share", "n_audits"), [(1.0, 3), (1e-9, 1)])
def test_where_nobody_says_how_often_checks_have_their_share_of_the_time(
    share: float, n_audits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(function, "USUAL", 8)
    monkeypatch.setattr(function, "SHARE", share)
    _, counters = compare(straight(33), at_most=WARM + n_audits + 1)
    assert counters["static_audits"] == n_audits


class Unseen:
    """Attributes of a class: nobody looks at these before a call."""

    how, weight = "as ever", 0.5


def impure(t: Training, x: Tensor, y: Tensor) -> Tensor:
    loss = loss_of(t, x, y)
    if Unseen.how == "other operator":
        loss = loss.sin()
    elif Unseen.how == "one more":
        loss = loss + loss.detach()
    return update(t, loss * Unseen.weight)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("how", "other operator", r"operator \d+ of a region was aten.mul.Tensor at .*test_refusals.py:\d+ and is now aten.sin"),
        ("how", "one more", r"operator \d+ of a region was aten.mul.Tensor at .*:\d+ and is now aten.(add|detach)"),
        (
            "weight",
            0.25,
            r"aten.mul.Tensor at .*test_refusals.py:\d+ takes another number than was foretold: 0.25 instead of 0.5",
        ),
    ],
)
def test_a_violated_audit_names_operator_and_line(name: str, value: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    t = Training(static=True, body=impure, audit=6)
    straight(8)(t)
    monkeypatch.setattr(Unseen, name, value)
    n_python = t.n_python
    before = [p.detach().clone() for p in t.model.parameters()]
    with pytest.raises(RuntimeError, match=said) as raised:
        straight(8)(t)
    assert "was called without its Python 5 times" in str(raised.value) and "static=True" in str(raised.value)
    # The call that found it has gone through Python, and it is learned anew.
    assert t.n_python == n_python + 1
    assert not all(map(torch.equal, before, t.model.parameters()))
    expected, got = Training(body=impure), t
    expected.model.load_state_dict(t.model.state_dict())
    expected.optimizer.load_state_dict(copy.deepcopy(t.optimizer.state_dict()))
    for i in range(10):
        assert torch.equal(expected.step(t.xs[i], t.ys[i]), got.step(t.xs[i], t.ys[i]))
    assert t.n_python < n_python + 1 + 10


def test_a_block_has_no_function_to_skip() -> None:
    with pytest.raises(TypeError, match=r"write @kitsune.accelerate\(static=True\) above"), kitsune.accelerate(static=True):
        pass


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"static": "yes"}, ValueError, r"static='yes' is not possible: static accepts True or False\."),
        (
            {"static": True, "audit": -1},
            ValueError,
            r"audit=-1 is not possible: audit accepts a whole number of 0 or more, or None\.",
        ),
        ({"audit": 5}, TypeError, r"write accelerate\(static=True, audit=\.\.\.\)"),
    ],
)
def test_options_are_checked(options: dict[str, Any], error: Any, said: str) -> None:
    with pytest.raises(error, match=said):
        kitsune.accelerate(**options)


def test_a_decorated_function_keeps_its_name() -> None:
    @kitsune.accelerate(static=True, audit=3)
    def step() -> None:
        """What it does."""

    assert step.__name__ == "step" and step.__doc__ == "What it does."
