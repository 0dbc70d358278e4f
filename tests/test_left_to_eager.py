"""Steps that the gate leaves to eager: nothing of Kitsune is there, and nothing tells the program where it began or ended."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Optimizer
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

import kitsune
from kitsune.demo.compare import same_bits
from kitsune.demo.train import FORMS, train
from kitsune.gate import ON_A_CPU, SHOWN
from kitsune.lazy import LazyTensor

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def gated() -> Iterator[None]:
    with kitsune.config.patch(gate=True, device="cpu"):
        kitsune.reset()
        yield
    kitsune.reset()
    assert not _get_current_dispatch_mode_stack()
    assert not _get_current_function_mode_stack()


class Turns:
    """Makes the gate of this thread leave and record steps in turn, so many at a time."""

    def __init__(self, n: int) -> None:
        self.n, self.seen, self.records, self.left = n, 0, True, None

    def end_of_step(self, optimizer: Optimizer) -> None:
        self.seen += 1
        self.records = (self.seen // self.n) % 2 == 0

    def end_of_context(self) -> None:
        pass

    restart = end_of_context


@pytest.fixture
def in_turns(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    def start(n: int) -> None:
        with kitsune.accelerate():
            (pipeline,) = kitsune.contexts.here.depth
        monkeypatch.setattr(pipeline, "gate", Turns(n))

    return start


def small(seed: int = 0) -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3))
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def batch(n: int, size: int = 5) -> torch.Tensor:
    return torch.randn(size, 6, generator=torch.Generator().manual_seed(n))


def plain_step(model: nn.Module, optimizer: Optimizer, n: int = 0) -> torch.Tensor:
    optimizer.zero_grad()
    loss = model(batch(n)).square().mean()
    loss.backward()
    optimizer.step()
    return loss.detach()


def modes() -> int:
    return len(_get_current_dispatch_mode_stack()) + len(_get_current_function_mode_stack())


def test_once_decided_nothing_more_is_recorded_and_no_mode_is_on() -> None:
    model, optimizer = small()
    with kitsune.accelerate():
        for n in range(SHOWN):
            assert modes()
            plain_step(model, optimizer, n)
        assert not modes()
        before = kitsune.counters()
        for n in range(20):
            assert type(plain_step(model, optimizer, n)) is torch.Tensor
        after = kitsune.counters()
    assert before["recorded"] and before["recorded"] == after["recorded"]
    assert before["observed"] == after["observed"]
    assert after["gate_left"] == 20
    assert not after["passed_through"].keys() - before["passed_through"].keys()


def test_doors_are_closed_and_views_are_as_in_eager_once_it_is_left() -> None:
    model, optimizer = small()
    numpy, view_replay = torch.Tensor.numpy, torch._C._is_view_replay_enabled()
    with kitsune.accelerate():
        for n in range(SHOWN):
            assert torch.Tensor.numpy is not numpy
            plain_step(model, optimizer, n)
        assert torch.Tensor.numpy is numpy
        assert torch._C._is_view_replay_enabled() is view_replay


def test_the_reason_is_told() -> None:
    model, optimizer = small()
    with kitsune.accelerate():
        for n in range(8):
            plain_step(model, optimizer, n)
    assert kitsune.counters()["gate_decided"] == {f"{ON_A_CPU}: the step is left to eager": 1}
    text = str(kitsune.explain())
    assert f"gate: {ON_A_CPU}" in text
    assert "gate: 4 steps left to eager so far; KITSUNE_GATE=0 records them all" in text


def test_the_decision_outlives_the_context_and_a_reset_ends_it() -> None:
    model, optimizer = small()
    for n in range(2):
        with kitsune.accelerate():
            for m in range(SHOWN):
                plain_step(model, optimizer, n + m)
    assert kitsune.counters()["gate_left"] == SHOWN
    kitsune.reset()
    with kitsune.accelerate():
        assert modes()


def test_without_the_knob_every_step_is_recorded_also_from_the_middle_on() -> None:
    model, optimizer = small()
    with kitsune.accelerate():
        for n in range(SHOWN):
            plain_step(model, optimizer, n)
        with kitsune.config.patch(gate=False):
            plain_step(model, optimizer)
            before = kitsune.counters()["recorded"]
            assert modes()
            plain_step(model, optimizer)
            assert kitsune.counters()["recorded"] > before
        plain_step(model, optimizer)
        assert not modes()


@pytest.mark.parametrize("model", ["lenet", "gpt"])
@pytest.mark.parametrize("form", FORMS)
def test_a_training_that_is_left_half_way_is_eagers_bit_for_bit(model: str, form: str) -> None:
    eager = train(model, None, steps=7, device=CPU)
    ours = train(model, form, steps=7, device=CPU)
    assert ours.losses == eager.losses
    assert ours.counters["gate_left"] == 7 - SHOWN
    for mine, theirs in ((ours.grads, eager.grads), (ours.params, eager.params)):
        assert mine.keys() == theirs.keys()
        assert all(same_bits(mine[name], theirs[name]) for name in mine)


def accumulate_and_evaluate(context: Any) -> list[torch.Tensor]:
    """Dropout, two batches to a step, an evaluation now and then, a schedule, clipping, and things kept from step to step."""
    model, optimizer = small()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    kept, total = [], torch.zeros(())
    with context:
        for n in range(12):
            for m in range(2):
                loss = F.cross_entropy(model(batch(2 * n + m, 5 - (n % 4 == 3))), torch.zeros(5 - (n % 4 == 3), dtype=torch.long))
                (loss / 2).backward()
                total = total + loss.detach()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            kept += [loss.detach(), total, *(p.grad for p in model.parameters())]
            optimizer.zero_grad()
            scheduler.step()
            if n % 3 == 2:
                with torch.no_grad():
                    model.eval()
                    kept.append(model(batch(99)).sum())
                    model.train()
        kept.append(torch.rand(3))
    state = [t for held in optimizer.state.values() for t in held.values()]
    assert all(type(t) is torch.Tensor for t in state)
    assert all(p.grad is None or type(p.grad) is torch.Tensor for p in model.parameters())
    versions = [torch.tensor(p._version) for p in model.parameters()]
    return [*kept, *state, *versions, *model.parameters(), *model.buffers()]


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_switching_in_both_directions_changes_nothing(n: int, in_turns: Callable[[int], None]) -> None:
    in_turns(n)
    eager = accumulate_and_evaluate(contextlib.nullcontext())
    ours = accumulate_and_evaluate(kitsune.accelerate())
    assert kitsune.counters()["recorded"]
    assert len(eager) == len(ours)
    assert all(torch.equal(a, b) for a, b in zip(eager, ours, strict=True))


def test_a_tensor_and_its_graph_cross_the_switch(in_turns: Callable[[int], None]) -> None:
    in_turns(1)
    found = []
    for context in (contextlib.nullcontext(), kitsune.accelerate()):
        (model, _), carried, hidden = small(), [], torch.zeros(5, 3)
        # Its steps write nothing that the graph needs.
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
        with context:
            for n in range(6):
                # The graph goes on from step to step, recorded and not in turn.
                hidden = torch.tanh(model(batch(n)) + hidden)
                model.zero_grad()
                hidden.square().mean().backward(retain_graph=True)
                carried += [p.grad.clone() for p in model.parameters()]
                optimizer.step()
        found.append([*carried, hidden.detach()])
    assert kitsune.counters()["recorded"] + kitsune.counters()["observed"]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_wrappers_from_before_the_switch_go_on_working(in_turns: Callable[[int], None]) -> None:
    in_turns(1)
    model, optimizer = small()
    with kitsune.accelerate():
        y = model(batch(0)).detach()
        plain_step(model, optimizer)
        assert not modes()
        assert type(y) is LazyTensor
        z, before = y * 2, y.clone()
        y.add_(1)
        assert torch.equal(z, before * 2)
        assert torch.equal(y, before + 1)
        assert y.numpy().shape == (5, 3)
        plain_step(model, optimizer)
        assert modes()
        w = y + z
    assert torch.equal(w, torch.from_numpy(y.numpy()) + z)


def test_no_switch_inside_of_a_backward() -> None:
    weight = torch.ones(3, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1)

    def step_now(parameter: torch.Tensor) -> None:
        optimizer.step()
        optimizer.zero_grad()

    weight.register_post_accumulate_grad_hook(step_now)
    with kitsune.accelerate():
        for _ in range(3 * SHOWN):
            (weight * 2).sum().backward()
    assert torch.allclose(weight, torch.ones(3) - 0.2 * 3 * SHOWN)


def test_a_mode_of_the_users_is_not_covered_when_recording_would_begin_again(in_turns: Callable[[int], None]) -> None:
    class Mine(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **kwargs or {})

    in_turns(1)
    model, optimizer = small()
    with kitsune.accelerate():
        plain_step(model, optimizer)
        with Mine():
            plain_step(model, optimizer)
            assert type(_get_current_dispatch_mode_stack()[-1]) is Mine
        plain_step(model, optimizer)
        assert modes()


def test_disable_inside_of_a_left_step_and_around_a_step() -> None:
    model, optimizer = small()
    with kitsune.accelerate():
        with kitsune.disable():
            for n in range(2 * SHOWN):
                plain_step(model, optimizer, n)
        assert modes()
        for n in range(SHOWN):
            plain_step(model, optimizer, n)
        with kitsune.disable():
            plain_step(model, optimizer)
        assert not modes()


def test_contexts_in_each_other() -> None:
    model, optimizer = small()
    with kitsune.accelerate():
        for n in range(SHOWN):
            plain_step(model, optimizer, n)
        with kitsune.accelerate(warmup=0):
            assert modes()
            plain_step(model, optimizer)
        assert not modes()
        with kitsune.accelerate():
            assert not modes()
            plain_step(model, optimizer)
    with kitsune.accelerate(warmup=0), kitsune.accelerate():
        plain_step(model, optimizer)


def test_a_function_without_an_optimizer_is_left_too() -> None:
    double = kitsune.accelerate(lambda x: x * 2)
    kinds = {type(double(torch.ones(2))) for _ in range(40)}
    assert kinds == {LazyTensor, torch.Tensor}
    assert kitsune.counters()["gate_left"]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A gate as on a device with kernels, by a clock of ours, which looks again after 6 steps."""
    from kitsune import gate

    monkeypatch.setattr(gate, "REVISIT", 6)
    with kitsune.accelerate():
        (pipeline,) = kitsune.contexts.here.depth
    now = [0.0]
    memory = (lambda: True), (lambda: 0), (lambda: None), (lambda: None)
    made = gate.Gate(True, pipeline.progress, lambda: now[0], *memory, kitsune.ir.quiet, kitsune.pipeline.tally)
    monkeypatch.setattr(pipeline, "gate", made)
    return now


@pytest.mark.parametrize("decorated", [False, True])
def test_a_measured_gate_takes_turns_and_looks_again(decorated: bool, measured: list[float]) -> None:
    """Recorded steps take 1.5 times as long as eager's."""
    eager, ours = small(), small()
    opened: list[bool] = []

    def step(n: int) -> torch.Tensor:
        opened.append(bool(kitsune.contexts.here.depth))
        measured[0] += 1.5 if modes() else 1.0
        return plain_step(*ours, n)

    torch.manual_seed(1)
    expected = [plain_step(*eager, n) for n in range(80)]
    torch.manual_seed(1)
    run = kitsune.accelerate(step) if decorated else step
    with contextlib.nullcontext() if decorated else kitsune.accelerate():
        assert all(torch.equal(run(n), expected[n]) for n in range(80))
    counted = kitsune.counters()
    assert counted["gate_decided"].keys() == {"It took 1.50 times as long as eager's over 12 steps: the step is left to eager"}
    assert counted["gate_revisited"] >= 1
    assert counted["gate_left"] >= 6
    # Each time it is left, until it looks again.
    assert decorated == (False in opened)
    assert not decorated or True in opened[opened.index(False) :]


def spied(fn: Callable[..., Any]) -> tuple[Callable[..., Any], list[bool]]:
    """A decorated function, and whether a context was open in each of its calls."""
    opened: list[bool] = []

    def call(*args: Any) -> Any:
        opened.append(bool(kitsune.contexts.here.depth))
        return fn(*args)

    return kitsune.accelerate(call), opened


def test_a_decorated_step_that_is_left_has_no_context() -> None:
    model, optimizer = small()
    step, opened = spied(plain_step)
    for n in range(SHOWN + 20):
        step(model, optimizer, n)
    assert opened == [True] * SHOWN + [False] * 20
    assert kitsune.counters()["gate_left"] == 20
    with kitsune.config.patch(gate=False):
        before = kitsune.counters()["recorded"]
        step(model, optimizer)
        assert opened[-1] and kitsune.counters()["recorded"] > before
    step(model, optimizer)
    step(model, optimizer)
    assert not opened[-1]
    with kitsune.config.patch(max_pending_ops=1000):
        # Of another pipeline nothing is decided.
        step(model, optimizer)
        assert opened[-1]
    step(model, optimizer)
    with kitsune.accelerate(warmup=0):
        n_left = kitsune.counters()["gate_left"]
        step(model, optimizer)
        # It is not left to eager: the outer context records it.
        assert kitsune.counters()["gate_left"] == n_left
    kitsune.reset()
    step(model, optimizer)
    assert opened[-1] and kitsune.counters()["observed"]


def test_a_decorated_function_of_several_steps_keeps_its_context() -> None:
    """In the middle of it, it may be time to look again."""
    model, optimizer = small()

    def epoch() -> None:
        for n in range(SHOWN + 1):
            plain_step(model, optimizer, n)

    run, opened = spied(epoch)
    for _ in range(4):
        run()
    assert opened == [True] * 4 and kitsune.counters()["gate_left"] == 3 * (SHOWN + 1) + 1


def test_a_decorated_function_without_an_optimizer_has_no_context_once_it_is_left() -> None:
    double, opened = spied(lambda x: x * 2)
    found = [double(torch.ones(2)) for _ in range(60)]
    assert type(found[-1]) is torch.Tensor and not opened[-1] and opened[0]
    n_left = kitsune.counters()["gate_left"]
    double(torch.ones(2))
    assert kitsune.counters()["gate_left"] == n_left + 1


def test_an_error_in_a_step_that_is_left_is_the_programs() -> None:
    model, optimizer = small()
    step, opened = spied(plain_step)
    for n in range(SHOWN + 2):
        step(model, optimizer, n)
    with pytest.raises(RuntimeError, match="manual_seed expected a long"):
        step(model, optimizer, "no number")
    step(model, optimizer, 0)
    assert not any(opened[-2:]) and not kitsune.contexts.here.depth
