"""The first steps of a training: what an optimizer makes in the first one, and updates that are new in the second."""

import contextlib
import importlib
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import nn
from torch.optim import ASGD, SGD, Adagrad, Adam, AdamW, RMSprop

import kitsune
from kitsune.ir import Barrier
from kitsune.lazy import new_state
from kitsune.lazy.new_state import collect
from kitsune.lazy.recorders import OPEN
from kitsune.running import Runner
from kitsune.session import trace_regions

COUNTS = ("observed", "regions", "recorded")


def steps(optimizer: Callable[..., Any]) -> Any:
    """Parameters, the optimizer's state and what was counted in each of four steps; and the same in eager."""

    def run(context: Any) -> Any:
        torch.manual_seed(0)
        model, xs = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), torch.randn(4, 5, 6)
        made, counted = optimizer(model.parameters()), []
        with context:
            for x in xs:
                before = kitsune.counters()
                model(x).square().sum().backward()
                made.step()
                made.zero_grad()
                counted.append([kitsune.counters()[name] - before[name] for name in COUNTS])
        state = [v for held in made.state.values() for v in held.values() if isinstance(v, torch.Tensor)]
        return [p.detach().clone() for p in model.parameters()], state, counted

    expected = run(contextlib.nullcontext())
    kitsune.reset()
    return run(kitsune.accelerate(device="cpu")), expected


def same(got: Any, expected: Any) -> bool:
    """Are parameters and state equal to the bit, and plain tensors?"""
    tensors, others = [*got[0], *got[1]], [*expected[0], *expected[1]]
    plain = {type(t) for t in tensors} == {torch.Tensor}
    return plain and len(tensors) == len(others) and all(map(torch.equal, tensors, others))


OPTIMIZERS = {
    "adamw-fused": lambda ps: AdamW(ps, lr=0.1, fused=True),
    "adamw-foreach": lambda ps: AdamW(ps, lr=0.1, foreach=True),
    "adamw-loop": lambda ps: AdamW(ps, lr=0.1, foreach=False),
    "adam-amsgrad": lambda ps: Adam(ps, lr=0.1, amsgrad=True, fused=True),
    "adagrad": lambda ps: Adagrad(ps, lr=0.1, foreach=False),
    "rmsprop": lambda ps: RMSprop(ps, lr=0.1, momentum=0.9, centered=True),
    "asgd-foreach": lambda ps: ASGD(ps, lr=0.1, foreach=True),
}


def test_an_optimizer_is_known_behind_torch_compiles_doors(monkeypatch: Any) -> None:
    """Once anything was compiled, AdamW has an `_init_group` of its own, and no longer Adam's."""
    monkeypatch.setattr(AdamW, "_init_group", torch._dynamo.disable(Adam._init_group))
    got, expected = steps(OPTIMIZERS["adamw-fused"])
    assert same(got, expected)
    n_ops = got[2][0][0]
    assert got[2] == [[n_ops, 1, 0], *[[0, 0, n_ops]] * 3]


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_second_step_is_the_region_of_the_first(optimizer: Any) -> None:
    got, expected = steps(optimizer)
    assert same(got, expected)
    n_ops = got[2][0][0]
    assert n_ops > 20 and got[2] == [[n_ops, 1, 0], *[[0, 0, n_ops]] * 3]


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}, {"foreach": True, "nesterov": True}], ids=str)
def test_an_update_that_is_new_does_not_end_its_region(options: Any) -> None:
    got, expected = steps(lambda ps: SGD(ps, lr=0.1, momentum=0.9, **options))
    assert same(got, expected)
    # A momentum's first step is another one than all later ones.
    (n_first, *_), *others = got[2]
    n_ops = others[0][2]
    assert n_first > 20 and n_ops > 20 and others == [[0, 1, n_ops], [0, 0, n_ops], [0, 0, n_ops]]


def test_the_first_run_of_a_region_finds_it_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    prepare = Runner._prepare

    def noted(self: Any, graph: Any) -> Any:
        made.append((graph, kitsune.counters()["recorded"]))
        return prepare(self, graph)

    monkeypatch.setattr(Runner, "_prepare", noted)
    with trace_regions() as graphs:
        steps(OPTIMIZERS["adamw-fused"])
    assert len(graphs) == 4 and len(set(graphs)) == 1 and made == [(graphs[0], 0)]


def test_what_is_alive_after_observed_ops_is_known() -> None:
    def program(new: bool) -> Any:
        held = x * 2
        kept = held + 1
        kept = kept * 3
        written = (held * 3).add_(1) if new else None
        kitsune.flush()
        return held, kept, written

    x = torch.ones(4)
    with kitsune.accelerate(device="cpu"), trace_regions() as graphs:
        for new in (False, False, True, True):
            held, kept, written = program(new)
    seen, known, diverged, followed = graphs
    # Not the sum, and the last product as it is after the write. Of the third region the last two ops were made at once.
    assert [v.id for v in seen.outputs] == [1, 3] and known is seen
    assert [v.id for v in diverged.outputs] == [1, 3, 5] and followed is diverged
    assert held.tolist() == [2] * 4 and kept.tolist() == [9] * 4 and written.tolist() == [7] * 4


def test_what_was_observed_is_not_kept_alive() -> None:
    kitsune.reset()
    with kitsune.accelerate(device="cpu"):
        big = torch.ones(64) * 2
        storage = weakref.ref(big.untyped_storage())
        assert kitsune.counters()["observed"] == 2
        del big
        assert storage() is None


def halved(p: Any) -> None:
    p.mul_(0.5)


def noisy(p: Any) -> None:
    p.add_(torch.rand_like(p))


def untouched(p: Any) -> None:
    pass


@pytest.mark.parametrize(
    ("make", "pending", "apart"),
    [
        pytest.param(lambda p, _: p.clone(), untouched, 4, id="reads what is there"),
        # The first ends what is pending: from there on all is made at once.
        pytest.param(lambda p, _: p.clone(), halved, 3, id="reads what is pending"),
        pytest.param(lambda p, _: torch.rand_like(p), noisy, 0, id="draws in turn"),
        pytest.param(lambda _, scale: scale.add_(1), untouched, 0, id="writes what is read"),
        pytest.param(lambda p, _: torch.full_like(p.grad, 0.3), halved, 0, id="a gradient"),
    ],
)
def test_state_is_made_apart_where_that_is_the_same(make: Any, pending: Any, apart: int) -> None:
    def run(context: Any, collects: Callable[[Any], Any]) -> Any:
        torch.manual_seed(0)
        model, xs, scale = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), torch.randn(5, 5, 6), torch.ones(())
        optimizer, state = SGD(model.parameters(), lr=1e-3), []
        with context:
            for i, x in enumerate(xs):
                (model(x) * scale).square().sum().backward()
                with torch.no_grad():
                    for p in model.parameters():
                        pending(p)
                    # When all before it is known and pending.
                    state = collects(lambda: [make(p, scale) for p in model.parameters()]) if i == 4 else []
                optimizer.step()
                optimizer.zero_grad()
        return [p.detach().clone() for p in model.parameters()] + [t * 1 for t in state]

    expected = run(contextlib.nullcontext(), lambda collected: collected())
    kitsune.reset()
    got = run(kitsune.accelerate(device="cpu"), lambda collected: collect(OPEN[-1], collected))
    assert len(got) == 8 and all(map(torch.equal, got, expected))
    assert n_apart() == apart


WRONG = {"one too few": [torch.zeros(3)], "another shape": [torch.zeros(3), torch.zeros(2)]}


@pytest.mark.parametrize("averages", WRONG.values(), ids=WRONG)
def test_an_update_that_cannot_be_is_refused_where_it_is_called(averages: Any) -> None:
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, "dampening": 0.0, "nesterov": False, "maximize": False}
    module, parameters, x = importlib.import_module("torch.optim.sgd"), [torch.ones(3), torch.ones(3)], torch.ones(3)
    with kitsune.accelerate(device="cpu"), torch.no_grad():
        module.sgd(parameters, [x * 2, x * 3], [torch.zeros(3), torch.zeros(3)], foreach=True, **options)
        kitsune.flush()
        with pytest.raises(RuntimeError):
            module.sgd(parameters, [x * 2, x * 3], averages, foreach=True, **options)


def n_apart() -> int:
    n: int = kitsune.counters()["passed_through"].get(Barrier.NEW_STATE.name, 0)
    return n


def test_who_fails_while_it_collects_leaves_things_as_they_were() -> None:
    with kitsune.accelerate(device="cpu"):
        with pytest.raises(ZeroDivisionError):
            collect(OPEN[-1], lambda: torch.zeros(3) + 1 / 0)
        kitsune.reset()
        torch.zeros(3)
    assert kitsune.counters()["observed"] == 1 and not n_apart()


def test_recording_that_is_switched_off_by_who_collects_stays_off() -> None:
    off = kitsune.disable()
    kitsune.reset()
    with kitsune.accelerate(device="cpu"):
        collect(OPEN[-1], off.__enter__)
        (torch.ones(3) * 2).sum().item()
        off.__exit__()
    counters = kitsune.counters()
    assert not counters["observed"] and not counters["recorded"] and not n_apart()


@pytest.mark.parametrize("torchs_own", [True, False])
def test_state_that_torchs_own_make_in_an_observed_step_does_not_come_by(torchs_own: bool, monkeypatch: Any) -> None:
    """Three operators for each parameter, of which nothing is learned."""
    kitsune.reset()
    came, made = [], new_state.make_state
    monkeypatch.setattr("kitsune.lazy.recorder.make_state", lambda *call: (came.append(1), made(*call))[1])
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    optimizer, others = AdamW(model.parameters(), fused=True), AdamW(nn.Linear(2, 2).parameters())
    with kitsune.accelerate(device="cpu"):
        model(torch.ones(2, 3)).sum().backward()
        function: Any = None if torchs_own else AdamW._init_group
        while function is not None:
            # Ours stands before torch's, and torch.compile's, if another test has used that, before or between them.
            monkeypatch.setattr(function, "__module__", "somebodys.optimizers")
            function = getattr(function, "__wrapped__", None)
        optimizer.step()
    assert len(optimizer.state) == 4 and not others.state and bool(came) is not torchs_own


def test_an_interrupt_at_that_moment_finds_recording_on_again(monkeypatch: Any) -> None:
    kitsune.reset()
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    optimizer = AdamW(model.parameters(), fused=True)
    with kitsune.accelerate(device="cpu"):
        model(torch.ones(2, 3)).sum().backward()
        leave = OPEN[-1].leave

        def interrupted() -> None:
            leave()
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(OPEN[-1], "leave", interrupted)
            optimizer.step()
        assert OPEN[-1].is_on_top() and not optimizer.state
