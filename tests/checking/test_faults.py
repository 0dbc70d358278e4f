"""A planner or a kernel that is broken on purpose is caught, and the first wrong operator is named with its line."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import kitsune
from kitsune.checking import CheckReport, Difference, reproduce
from kitsune.runtime import instructions
from kitsune.runtime.frame import Frame, Layout
from tests.checking.faults import Draws, LastElement, Nothing, Off, WritesWhatItReads, planner_that
from tests.runtime.backends import backend, runner
from tests.runtime.repeated import Repeated, graphs
from tests.runtime.test_real_plans import Walk


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Any:
    # What is broken on purpose may not pass the planner's own checks.
    kitsune.reset()
    with kitsune.config.patch(cache_dir=tmp_path, verify=False):
        yield tmp_path


def line_of(function: Callable[..., Any], mark: str) -> int:
    lines, first = inspect.getsourcelines(function)
    return next(first + k for k, line in enumerate(lines) if line.rstrip().endswith(f"# {mark}"))


def verify(step: Callable[..., Any], *batch: Any, start: Any = Walk, **options: Any) -> CheckReport:
    with backend(start):
        return kitsune.verify(step, *batch, device="cpu", steps=3, **options)


def assert_found(report: CheckReport, operator: str, step: Callable[..., Any], mark: str) -> Difference:
    assert len(report.differences) == 1, str(report)
    (found,) = report.differences
    assert not report and not report.equal
    assert found.operator == operator, str(report)
    assert found.site == f"{__file__}:{line_of(step, mark)}", str(report)
    assert found.site in str(report) and found.reproduction in str(report)
    return found


def chain(x: torch.Tensor) -> torch.Tensor:
    y = x * 2  # first
    y = y.exp()  # second
    y = y + 1  # third
    kitsune.flush()
    return y


def test_an_operator_inside_of_a_kernel_is_named() -> None:
    found = assert_found(verify(chain, torch.rand(4, 6), start=Off), "aten.exp.default", chain, "second")
    assert found.kernel == "mul_exp_add" and len(found.kernel_ops) == 3
    assert "of 24 elements differ" in found.sentence


def test_what_a_kernel_leaves_out_is_named_by_its_first_operator() -> None:
    found = assert_found(verify(chain, torch.rand(4, 6), start=LastElement), "aten.mul.Tensor", chain, "first")
    assert found.kernel == "mul_exp_add" and "1 of 24 elements differ, the first at [3, 5]" in found.sentence


def test_the_arena_of_a_checked_run_has_no_values_in_it_and_that_of_others_is_left_alone() -> None:
    arenas = [types.SimpleNamespace(tensor=torch.ones(8, dtype=torch.uint8), address=0) for _ in range(2)]
    for arena, poisoned in zip(arenas, (True, False), strict=True):
        Frame(Layout({}, {}, (), 1, 0), [], [], 0, poisoned).move_in(arena)
    assert arenas[0].tensor.tolist() == [255] * 8 and arenas[1].tensor.tolist() == [1] * 8
    with backend(), kitsune.config.patch(check=True):
        with kitsune.accelerate(warmup=0, device="cpu"):
            chain(torch.rand(4, 6))
        assert kitsune.counters()["checked"] and not runner().executor.poisons


def test_memory_that_a_kernel_has_not_written_is_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    # Even where it holds the right numbers from before.
    x = torch.rand(4, 6)
    right = x.mul(2).exp() + 1
    monkeypatch.setattr(instructions, "unfilled", lambda _: right.clone())
    found = assert_found(verify(chain, x, start=Nothing), "aten.mul.Tensor", chain, "first")
    assert "24 of 24 elements differ, the first at [0, 0]: nan instead of" in found.sentence


def through_a_view(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    part = y.t()[1:]
    z = part.exp()  # here
    z = z * part
    kitsune.flush()
    return z


def test_an_operator_behind_a_view_is_named() -> None:
    assert_found(verify(through_a_view, torch.rand(4, 6), start=Off), "aten.exp.default", through_a_view, "here")


def in_place(x: torch.Tensor, state: torch.Tensor) -> None:
    state.mul_(0.5)
    state.add_(x.exp())  # here
    kitsune.flush()


def test_what_is_written_in_place_is_compared_and_begins_as_it_was() -> None:
    x, state, twin = torch.rand(8), torch.ones(8), torch.ones(8)
    report = verify(in_place, x, state)
    assert report.equal and report.values, str(report)
    for _ in range(3):
        twin.mul_(0.5).add_(x.exp())
    assert torch.equal(state, twin)
    assert_found(verify(in_place, x, state, start=Off), "aten.exp.default", in_place, "here")


def rounded(x: torch.Tensor) -> torch.Tensor:
    y = x + 1
    half = y.to(torch.bfloat16)
    y = half.float()  # here
    y = y * 2
    kitsune.flush()
    return y


def test_a_cast_that_the_planner_drops_is_named() -> None:
    with planner_that("drops casts"):
        assert_found(verify(rounded, torch.rand(32)), "aten._to_copy.default", rounded, "here")


def reads_before_a_write(x: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    a = x.cumsum(0)
    b = a @ x  # here
    a.index_add_(0, index, x)
    kitsune.flush()
    return a, b


def test_an_edge_that_the_planner_drops_is_found_at_the_reader() -> None:
    batch = torch.rand(4, 4), torch.arange(4)
    assert verify(reads_before_a_write, *batch).equal
    with planner_that("drops edges"):
        assert_found(verify(reads_before_a_write, *batch), "aten.mm.default", reads_before_a_write, "here")


def crowded(x: torch.Tensor) -> torch.Tensor:
    a = x @ x  # here
    a = a @ (x @ a)
    kitsune.flush()
    return a


def test_memory_that_is_used_again_too_early_is_found() -> None:
    x = torch.rand(4, 4)
    assert verify(crowded, x).equal
    with planner_that("reuses memory"):
        (found,) = verify(crowded, x).differences
    assert "its memory in the arena is written by something else before" in found.sentence
    assert (found.operator, found.site) == ("aten.mm.default", f"{__file__}:{line_of(crowded, 'here')}")


def test_an_input_that_is_only_read_must_stay() -> None:
    (found,) = verify(chain, torch.rand(4, 6), start=WritesWhatItReads).differences
    assert "is only read, and has changed" in found.sentence


def draws(x: torch.Tensor) -> torch.Tensor:
    y = torch.nn.functional.dropout(x, 0.5)
    y = (y + 1) * 2
    kitsune.flush()
    return y


def test_the_generator_is_compared_and_left_as_the_step_leaves_it() -> None:
    (found,) = verify(draws, torch.rand(4, 6), start=Draws).differences
    assert "the random generator is left in another state" in found.sentence
    x = torch.rand(4, 6)
    torch.manual_seed(3)
    expected = [torch.nn.functional.dropout(x, 0.5) for _ in range(3)]
    torch.manual_seed(3)
    kept: list[torch.Tensor] = []
    assert verify(lambda x: kept.append(draws(x)), x).equal
    assert all(torch.equal(a, (b + 1) * 2) for a, b in zip(kept, expected, strict=True))


def test_a_result_on_memory_of_its_own_where_eager_has_a_view(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = x * 2
        part = y[1:]  # here
        kitsune.flush()
        return y, part

    from kitsune.running import Runner

    run = Runner.run

    def broken(self: Any, graph: Any, values: Any, scalars: Any) -> None:
        run(self, graph, values, scalars)
        values[graph.outputs[-1].id] = values[graph.outputs[-1].id].clone()

    monkeypatch.setattr(Runner, "run", broken)
    kept: list[Any] = []
    (found,) = verify(lambda x: kept.append(step(x)), torch.rand(4)).differences
    assert "does not share memory" in found.sentence and found.site.endswith(f":{line_of(step, 'here')}")


def training(x: torch.Tensor) -> Callable[[], torch.Tensor]:
    w = torch.ones(6, 3, requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=0.1)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (x @ w).exp().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def test_a_replay_as_a_graph_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    replay = Repeated.replay

    def broken(self: Repeated) -> None:
        replay(self)
        next(t for t in self._memory if t.numel() == 18).mul_(1.5)

    with graphs():
        report = kitsune.verify(training(torch.rand(4, 6)), device="cpu")
    assert report.equal and report.replays > 2, str(report)
    monkeypatch.setattr(Repeated, "replay", broken)
    with graphs():
        (found,) = kitsune.verify(training(torch.rand(4, 6)), device="cpu").differences
    assert "run launch by launch the plan agrees with eager, and run as a CUDA graph it does not" in found.sentence


def test_a_static_function_is_checked() -> None:
    step = kitsune.accelerate(static=True, device="cpu", warmup=0)(training(torch.rand(4, 6)))
    with backend(), kitsune.config.patch(check=True):
        for _ in range(8):
            step()
        counts = kitsune.counters()
    assert counts["static_skipped"] > 2 and counts["checked"] >= 8 and not counts["different"]


def test_a_static_function_whose_regions_are_replayed_is_checked() -> None:
    with graphs():
        step = kitsune.accelerate(static=True, device="cpu", warmup=0)(training(torch.rand(4, 6)))
        for _ in range(12):
            step()
        before = kitsune.counters()
        with kitsune.config.patch(check=True):
            for _ in range(4):
                step()
        after = kitsune.counters()
    gained = {name: after[name] - before[name] for name in ("static_skipped", "replayed", "checked", "different")}
    assert gained == {"static_skipped": 4, "replayed": 4, "checked": 4, "different": 0}


def test_without_verify_it_is_a_warning_and_said_once() -> None:
    x = torch.rand(4, 6)
    with backend(Off), kitsune.config.patch(check=True), kitsune.accelerate(warmup=0, device="cpu"):
        with pytest.warns(kitsune.KitsuneWarning, match=r"differ at aten\.exp\.default, .*test_faults\.py:\d+") as told:
            for _ in range(3):
                chain(x)
        assert len(told) == 1
        assert kitsune.counters()["different"] == 1 and kitsune.counters()["checked"] == 3
        assert "note: Kitsune and eager differ at aten.exp.default" in str(kitsune.explain())


def again(script: str, fault: str = "") -> subprocess.CompletedProcess[str]:
    """Run a reproduction in a process of its own, with a planner that is broken there or is not."""
    program = f"import runpy; runpy.run_path({script!r}, run_name='__main__')"
    if fault:
        program = f"from tests.checking.faults import planner_that\nwith planner_that({fault!r}):\n    {program}"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "KITSUNE_VERIFY": "0"}
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("fault", "step", "batch"),
    [("drops casts", rounded, [torch.rand(32)]), ("drops edges", reads_before_a_write, [torch.rand(4, 4), torch.arange(4)])],
)
def test_the_reproduction_shows_the_difference(fault: str, step: Any, batch: list[torch.Tensor], folder: Path) -> None:
    with planner_that(fault):
        (found,) = verify(step, *batch).differences
    path = Path(found.reproduction)
    assert path.parent == folder / "differences" and path.with_suffix(".pt").exists()
    broken, healthy = again(str(path), fault), again(str(path))
    assert broken.returncode == 1 and found.site in broken.stdout, broken.stdout + broken.stderr
    assert re.search(r"\d+ of \d+ elements differ", broken.stdout)
    assert healthy.returncode == 0 and "Eager and the plan are equal" in healthy.stdout, healthy.stdout + healthy.stderr


def test_a_reproduction_draws_what_the_region_drew(capsys: pytest.CaptureFixture[str]) -> None:
    def step(x: torch.Tensor, index: torch.Tensor) -> Any:
        return reads_before_a_write(F.dropout(x, 0.5), index)

    with planner_that("drops edges"):
        (found,) = verify(step, torch.rand(4, 4), torch.arange(4)).differences
    torch.manual_seed(77)
    assert reproduce(found.reproduction) == 0, capsys.readouterr().out
    assert "Eager and the plan are equal" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with kitsune.config.patch(cache_dir=tmp_path / "file"):
        (found,) = verify(chain, torch.rand(4, 6), start=Off).differences
    assert not found.reproduction and "could not be written to" in str(found)
