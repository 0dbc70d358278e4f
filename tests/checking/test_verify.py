"""Healthy programs are reported equal, whatever they do; `kitsune.verify` is what users call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import kitsune
from kitsune.demo.train import build, make_train_step
from tests.runtime.backends import backend, know_look_up, lazily, look_up, loop, runner
from tests.runtime.repeated import graphs


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Any:
    kitsune.reset()
    with kitsune.config.patch(cache_dir=tmp_path):
        yield tmp_path


def demo(model: str, half: bool) -> tuple[Callable[[], torch.Tensor], torch.nn.Module]:
    torch.manual_seed(0)
    task = build(model, 10, torch.device("cpu"))
    step = make_train_step(task)
    ((x, y),) = task.data.batches(1, 4, torch.Generator().manual_seed(0))

    def train_step() -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            return step(x, y)

    return train_step, task.model


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("model", ["lenet", "gpt"])
def test_the_demo_s_models_are_equal_over_ten_steps(model: str, half: bool) -> None:
    step, trained = demo(model, half)
    with backend():
        report = kitsune.verify(step, steps=10, device="cpu")
    assert report.equal and report, str(report)
    assert report.steps == 10 and report.regions >= 8 and report.values > 100 and report.kernels > 50
    assert "Everything is equal to eager, bit for bit." in str(report)
    # The check changes nothing of what the steps do.
    eager, twin = demo(model, half)
    for _ in range(10):
        eager()
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), twin.parameters(), strict=True))


def test_reductions_in_an_order_of_their_own_are_within_what_strict_allows() -> None:
    step, _ = demo("lenet", False)
    # Sums in two stages, and statistics taken apart: the kernels' operators one by one.
    broken = pytest.warns(kitsune.KitsuneWarning, match="are run one by one")
    with backend(_no_kernel), kitsune.config.patch(numerics="strict"), broken:
        report = kitsune.verify(step, device="cpu")
    assert report.equal and report.rounded, str(report)
    assert "numerics='strict' allows" in str(report)


def _no_kernel(launch: Any) -> Any:
    raise RuntimeError("there is none")


def test_graphs_with_numbers_that_move_and_random_numbers_are_checked() -> None:
    with kitsune.config.patch(check=True), graphs():
        got = loop(lazily(), steps=8)
        counts = kitsune.counters()
    expected = loop(lazily(), steps=8)
    assert counts["replayed"] > 2 and counts["checked"] >= 8 and not counts["different"]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_step_that_reads_values() -> None:
    w = torch.rand(6, 3, requires_grad=True)
    seen = []

    def step(x: torch.Tensor) -> None:
        loss = (x @ w).exp().sum()
        if loss.item() > 0:
            loss.backward()
        seen.append(w.grad.sum().item())

    with backend():
        report = kitsune.verify(step, torch.rand(4, 6), device="cpu", steps=5)
    assert report.equal and report.regions >= 8 and len(seen) == 5, f"{report}\n{kitsune.explain()}"


def test_a_step_that_raises_raises_as_ever() -> None:
    def step(index: int) -> torch.Tensor:
        y = look_up(index)
        kitsune.flush()
        return y

    with backend():
        know_look_up()
        assert kitsune.verify(step, 1, device="cpu", steps=2).equal
        with pytest.raises(IndexError, match="out of range") as raised, kitsune.config.patch(check=True), lazily():
            step(3)
        assert kitsune.counters()["different"] == 0
    assert any("recorded by Kitsune at" in note for note in getattr(raised.value, "__notes__", [str(raised.value)]))


def test_what_the_plan_raises_and_eager_does_not_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(self: Any, *args: Any) -> None:
        raise ArithmeticError("lost")

    with backend(), kitsune.config.patch(check=True), lazily():
        y = torch.ones(3) * 2
        monkeypatch.setattr("kitsune.running.PlanExecutor.run", run)
        with pytest.raises(ArithmeticError), pytest.warns(kitsune.KitsuneWarning, match="raises ArithmeticError"):
            kitsune.flush()
        del y


def test_an_exception_of_the_step_leaves_verify(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(x: torch.Tensor) -> None:
        (x * 2).sum().item()
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        kitsune.verify(step, torch.ones(2), device="cpu")
    assert not kitsune.config.check
    with pytest.raises(ValueError, match=r"steps=0 is not possible: steps accepts a whole number of 1 or more\."):
        kitsune.verify(step, steps=0)


def test_a_function_that_records_nothing_is_not_called_equal_for_that() -> None:
    report = kitsune.verify(lambda: None, device="cpu", steps=2)
    assert "Nothing was recorded, so that nothing could be checked" in str(report)
    assert "Everything is equal" not in str(report) and not report


def test_what_could_not_be_checked_is_not_called_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    def judge(*args: Any) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr("kitsune.checking.check.judge", judge)
    report = kitsune.verify(lambda x: (x * 2).sum().item(), torch.ones(3), device="cpu")
    assert not report and "There was no memory to check a region of" in str(report)
    with lazily(), kitsune.config.patch(check=True), pytest.warns(kitsune.KitsuneWarning, match="no memory to check"):
        (torch.ones(3) * 3).sum().item()


def test_a_fault_of_the_check_itself_does_not_end_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    def judge(*args: Any) -> None:
        torch.rand(3)
        raise LookupError("oh")

    monkeypatch.setattr("kitsune.checking.check.judge", judge)
    state = torch.get_rng_state()
    told = pytest.warns(kitsune.KitsuneWarning, match=r"could not be checked \(LookupError: oh\)")
    with lazily(), kitsune.config.patch(check=True, verify=False), told:
        assert (torch.ones(3) * 3).sum().item() == 9
    assert torch.equal(torch.get_rng_state(), state)


def test_the_gate_leaves_nothing_to_eager_while_runs_are_checked() -> None:
    with kitsune.config.patch(gate=True, check=True):
        loop(lazily(), steps=8)
    assert kitsune.counters()["gate_left"] == 0 and kitsune.counters()["checked"] >= 8


def test_memory_that_nobody_has_written_is_not_compared() -> None:
    def step() -> tuple[torch.Tensor, torch.Tensor]:
        kept = torch.empty(64), torch.empty(8).fill_(3)
        kitsune.flush()
        return kept

    report = kitsune.verify(step, device="cpu", steps=4)
    # The one that is filled is.
    assert report.equal and report.values == report.regions > 0


def test_numbers_of_eight_bits_and_complex_ones_are_compared() -> None:
    def step(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        kept = x.to(torch.float8_e4m3fn), torch.complex(x, -x).conj() * 2
        kitsune.flush()
        return kept

    assert kitsune.verify(step, torch.randn(9), device="cpu", steps=3).equal


def test_without_the_knob_nothing_is_run_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any) -> None:
        raise AssertionError("checked")

    monkeypatch.setattr("kitsune.pipeline.checked_run", never)
    with lazily():
        y = torch.ones(3) + 1
    assert y.tolist() == [2.0] * 3 and kitsune.counters()["checked"] == 0
    with kitsune.config.patch(check=True), pytest.raises(AssertionError, match="checked"), lazily():
        y = torch.ones(3) + 1


def test_a_results_memory_is_not_held_by_the_check() -> None:
    # What is still held would be moved before a graph is replayed again.
    w = torch.ones(6, 3, requires_grad=True)
    x = torch.rand(4, 6)
    optimizer = torch.optim.SGD([w], lr=0.1)

    def step() -> None:
        optimizer.zero_grad()
        F.mse_loss((x @ w).exp(), torch.ones(4, 3)).backward()
        optimizer.step()

    with graphs(), lazily(), kitsune.config.patch(check=True):
        for _ in range(8):
            step()
        counts = kitsune.counters()
        assert runner().tally.n_replayed > 3 and counts["checked"] == 8
        assert not any("holds a view" in reason for reason in counts["graph_missed"])


def test_a_workspace_that_a_library_writes_is_no_difference() -> None:
    """The backward of an LSTM writes what its forward has left for it, which torch declares nowhere."""
    lstm = torch.nn.LSTM(4, 5, batch_first=True)

    def step(x: torch.Tensor) -> None:
        loss = lstm(x)[0].square().mean()
        # So that the backward is in another region, and the workspace comes in.
        kitsune.flush()
        loss.backward()
        lstm.zero_grad()

    report = kitsune.verify(step, torch.rand(3, 6, 4), device="cpu", steps=4)
    assert report.equal and report.values > 20, str(report)
