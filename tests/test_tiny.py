"""One of everything, in seconds: run this first."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import kitsune
from kitsune.ir import Barrier
from kitsune.lazy import LazyTensor
from kitsune.session import trace_regions


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    kitsune.reset()
    yield


def step(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    w.grad = None
    loss = (x @ w).tanh().square().mean()
    loss.backward()
    return loss


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 2, generator=generator, requires_grad=True), torch.randn(4, 3, generator=generator)


def expected() -> tuple[float, torch.Tensor | None]:
    w, x = data()
    return step(w, x).item(), w.grad


@pytest.mark.parametrize("warmup", [0, 1])
def test_a_step_is_recorded_recognised_and_exact(warmup: int) -> None:
    value, grad = expected()
    w, x = data()
    for _ in range(3):
        with kitsune.accelerate(warmup=warmup, device="cpu"):
            loss = step(w, x)
            assert isinstance(loss, LazyTensor)
        assert loss.item() == value
        assert type(w.grad) is torch.Tensor
        assert torch.equal(w.grad, grad)  # type: ignore[arg-type]
    counters = kitsune.counters()
    assert counters["recorded"] == (3 - warmup) * counters["executed"] / (3 - warmup)
    assert counters["observed"] == (counters["recorded"] // 2 if warmup else 0)
    assert counters["recognised"] == 2
    assert counters["flushed"] == {"EXIT": 3}


def test_nothing_runs_before_the_flush() -> None:
    with kitsune.accelerate(warmup=0, device="cpu"):
        y = torch.ones(2) + 1
        assert kitsune.counters()["executed"] == 0
        kitsune.flush()
        assert kitsune.counters()["executed"] == 2
    assert y.tolist() == [2.0, 2.0]


def test_what_nobody_needs_is_not_run() -> None:
    x = torch.ones(2)
    with kitsune.accelerate(warmup=0, device="cpu"):
        y = x.exp()
        z = x + 1
        del y
    assert kitsune.counters()["skipped"] == 1
    assert z.tolist() == [2.0, 2.0]


def test_the_decorator_keeps_name_signature_and_result() -> None:
    @kitsune.accelerate
    def double(x: torch.Tensor, by: float = 2.0) -> torch.Tensor:
        """Doubles."""
        return x * by

    assert (double.__name__, double.__doc__) == ("double", "Doubles.")
    with kitsune.config.patch(device="cpu"):
        assert double(torch.ones(1), by=3.0).item() == 3.0
    assert kitsune.counters()["flushed"]


def test_the_decorator_with_options_and_the_optimizer_record() -> None:
    w, x = data()
    optimizer = torch.optim.SGD([w], lr=0.1)

    @kitsune.accelerate(warmup=0, device="cpu")
    def train_step() -> None:
        step(w, x)
        optimizer.step()

    train_step()
    assert kitsune.counters()["flushed"] == {"STEP": 1}


def test_contexts_nest_and_the_mode_is_gone_afterwards() -> None:
    outer = kitsune.accelerate(warmup=0, device="cpu")
    with outer, outer, kitsune.accelerate(warmup=1, device="cpu"):
        y = torch.ones(1) + 1
    assert torch.utils._python_dispatch._get_current_dispatch_mode_stack() == []
    assert type(torch.ones(1) + 1) is torch.Tensor
    assert y.item() == 2.0


def test_disable_is_plain_pytorch() -> None:
    with kitsune.accelerate(warmup=0, device="cpu"):
        x = torch.ones(1) + 1
        with kitsune.disable():
            assert type(x + 1) is torch.Tensor
        assert isinstance(x + 1, LazyTensor)

        @kitsune.disable
        def plain(t: torch.Tensor) -> torch.Tensor:
            return t + 1

        assert type(plain(x)) is torch.Tensor


def test_kitsune_0_is_plain_pytorch() -> None:
    with kitsune.config.patch(enabled=False), kitsune.accelerate():
        assert type(torch.ones(1) + 1) is torch.Tensor
    assert kitsune.counters()["flushed"] == {}


def test_explain_names_cause_and_line() -> None:
    with kitsune.accelerate(warmup=0, device="cpu"):
        (torch.ones(1) + 1).item()
    flush = kitsune.explain().flushes[0]
    assert (flush.cause, flush.count) == ("ITEM", 1)
    assert flush.why == Barrier.ITEM.value
    assert "test_tiny.py:" in flush.site
    assert "ITEM at" in str(kitsune.explain())


def test_a_graph_prints_in_torch_notation() -> None:
    x = torch.ones(2, 4, requires_grad=True)
    with trace_regions() as graphs, kitsune.accelerate(warmup=0, device="cpu"):
        y = torch.mm(x, x.t()).mul_(0.5)  # noqa: F841 - alive, so an output, and autograd keeps x.t()
    assert str(graphs[0]).splitlines() == [
        "$0: f32[2, 4] = input",
        "$1: f32[4, 2] = aten.t.default($0)",
        "$2: f32[2, 2] = aten.mm.default($0, $1)",
        "$3: f32[2, 2] = aten.mul_.Tensor($2, %0)",
        "return ($1, $3)",
    ]


def test_a_learning_rate_that_changes_is_the_same_region() -> None:
    w, x = data()
    for lr in (0.1, 0.2, 0.3):
        with kitsune.accelerate(warmup=0, device="cpu"):
            step(w, x)
            torch.optim.SGD([w], lr=lr).step()
    assert kitsune.counters()["recognised"] == 2


def test_the_bound_on_operators_flushes() -> None:
    with kitsune.config.patch(max_pending_ops=10), kitsune.accelerate(warmup=0, device="cpu"):
        x = torch.zeros(1)
        for _ in range(95):
            x = x + 1
    assert kitsune.counters()["flushed"] == {"BOUND": 9, "EXIT": 1}
    assert x.item() == 95.0


def test_the_bound_on_bytes_flushes() -> None:
    with kitsune.config.patch(max_pending_bytes=4096), kitsune.accelerate(warmup=0, device="cpu"):
        x = torch.zeros(256)
        for _ in range(10):
            x = x + 1
    assert kitsune.counters()["flushed"]["BOUND"] >= 2
    assert x[0].item() == 10.0
