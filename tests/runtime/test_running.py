"""The Runner: by plan where there is a backend, op by op where there is none, and a sentence about whatever went wrong."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

import kitsune
from kitsune.backends import nearest_arch
from kitsune.config import KitsuneWarning, config
from kitsune.ir import Launch, Pending
from kitsune.profiler import Tally
from kitsune.running import Backend, Runner, backend_of
from kitsune.runtime.instructions import Alias
from kitsune.session import trace_regions
from tests.runtime.backends import assert_equal, backend, chain, know_look_up, lazily, look_up, loop, runner
from tests.runtime.naive import FakeLaunch
from tests.runtime.test_real_plans import Walk

CUDA = torch.device("cuda", 0)
EXPECTED = chain()
pytestmark = pytest.mark.usefixtures("fresh")


def counted(*names: str) -> list[int]:
    return [kitsune.counters()[name] for name in names]


@pytest.mark.parametrize("warmup", [0, 1])
def test_training_by_plan_leaves_what_eager_leaves(warmup: int) -> None:
    expected = loop(kitsune.disable())
    with backend():
        assert_equal(loop(lazily(warmup=warmup)), expected)
        planned, launched, kernels, fused = counted("planned", "launched", "kernels", "fused")
        assert 0 < kernels < launched < planned
        assert kernels < fused < planned
        report = kitsune.explain()
        assert not report.mended
        assert max(plan.times_run for plan in report.plans) >= 2
        assert any(plan.refusals for plan in report.plans)
        assert "not fused" in str(report) and "us modelled" in str(report)


def test_without_fuse_nothing_is_run_by_plan() -> None:
    with backend(), config.patch(fuse=False):
        assert_equal(loop(lazily()), loop(kitsune.disable()))
        assert counted("planned", "launched", "kernels", "fused") == [0, 0, 0, 0]
        assert "no region was planned" in str(kitsune.explain())


def test_fuel_bounds_the_fusions() -> None:
    found = []
    with backend():
        for fuel in (0, 1, None):
            kitsune.reset()
            with config.patch(fuel=fuel):
                assert_equal(loop(lazily()), loop(kitsune.disable()))
            found.append(kitsune.counters()["kernels"])
    assert found[0] == 0 < found[1] < found[2]


def test_fuse_may_change_between_two_runs_of_a_region() -> None:
    with backend():
        for fuse in (True, False, True):
            with config.patch(fuse=fuse), lazily():
                got = chain()
            assert torch.equal(got, EXPECTED)
        assert counted("regions", "kernels") == [1, 2]


@pytest.mark.parametrize("fails", [False, True])
def test_without_a_pool_nothing_is_held_after_a_run(fails: bool) -> None:
    def program(index: int) -> torch.Tensor:
        with lazily():
            x = torch.ones(64, 64)
            y = ((x + 1) @ x + (x - 1) @ x) @ x
            z = (y * 2) @ x
            return look_up(index).sum() + z

    with backend():
        know_look_up()
        for pool in (True, False):
            with config.patch(pool=pool):
                if fails:
                    with pytest.raises(IndexError):
                        program(7)
                else:
                    program(2)
            statistics = runner().executor.pool.statistics
            assert (statistics.held_bytes > 0) is pool
            assert statistics.used_bytes == 0


def test_without_triton_there_is_a_sentence_and_no_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install kitsune-torch[triton]" in str(backend_of(CUDA))


def test_an_older_gpu_has_a_sentence_and_no_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "An older one")
    assert backend_of(CUDA) == ("An older one has compute capability 7.5 and kernels need 8.0 or later, so regions run op by op.")


def test_a_gpu_without_a_backend_is_told_at_the_first_region(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("kitsune.running.recorder_of", lambda device: None)
    tally = Tally()
    it = Runner(CUDA, tally)
    with trace_regions() as graphs, lazily():
        assert chain().sum().item() == EXPECTED.sum().item()
    with pytest.warns(KitsuneWarning, match="Triton is not installed") as said:
        for _ in range(2):
            it.run(graphs[0], [None] * 20, [1.0, 0.5])
    assert len(said) == len(tally.mended) == 1


def test_a_newer_gpu_is_planned_for_as_its_nearest_older_relative(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [nearest_arch(*n) for n in ((8, 0), (8, 9), (9, 0), (12, 1))] == ["sm_80", "sm_80", "sm_90", "sm_90"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "one of tomorrow")
    found = backend_of(CUDA)
    assert isinstance(found, Backend) and found.arch == "sm_90"


def test_the_cpu_has_no_kernels_and_nothing_is_said() -> None:
    assert "op by op" in str(backend_of(torch.device("cpu")))
    with lazily():
        assert torch.equal(chain(), EXPECTED)
    assert counted("planned") == [0] and not kitsune.explain().mended


def test_regions_are_forgotten_with_their_plans() -> None:
    with backend(FakeLaunch):
        with lazily():
            chain()
        kitsune.reset()
        assert not runner().ready and runner().executor.pool.statistics.held_bytes == 0


def written(n: int) -> tuple[torch.Tensor, ...]:
    y = torch.ones(8, 8)
    for _ in range(n):
        y.mul_(0.999)
    return (y,)


def viewed(n: int) -> tuple[torch.Tensor, ...]:
    y = torch.ones(8, 8) * 2
    for k in range(n):
        y = y.t() if k % 2 else y.view(8, 8)
    return y + 1, y


def written_through_views(n: int) -> tuple[torch.Tensor, ...]:
    y = view = torch.ones(8, 8) * 2
    for _ in range(n):
        view = view.t()
        view.mul_(0.999)
    return y + 1, view


class LastIsPending(Walk):
    """Of a plan's kernels, the last one is not there yet."""

    last: Any = None

    def __init__(self, launch: Launch) -> None:
        super().__init__(launch)
        LastIsPending.last = self

    def start(self, *args: Any) -> None:
        if self is LastIsPending.last:
            raise Pending("later")
        super().start(*args)


@pytest.mark.parametrize("kernels", [Walk, LastIsPending])
@pytest.mark.parametrize("program", [written, viewed, written_through_views], ids=lambda p: p.__name__)
def test_thousands_of_values_each_of_the_last_are_no_recursion(
    program: Callable[[int], tuple[torch.Tensor, ...]], kernels: Callable[[Launch], Any]
) -> None:
    """2,000 writes of one tensor could not be planned, nor a kernel behind them be run by its operators: "maximum recursion depth
    exceeded"."""
    n = 2 * sys.getrecursionlimit()
    expected = program(n)
    with backend(kernels):
        for _ in range(2):
            with lazily():
                found = program(n)
            assert all(map(torch.equal, found, expected))
        assert counted("planned")[0] >= 2 * n and not kitsune.explain().mended


def test_versions_of_a_tensor_that_nobody_asks_for_are_passed_over() -> None:
    with backend():
        for _ in range(2):
            with lazily():
                written(100)
        (ready,) = runner().ready.values()
        assert sum(type(instruction) is Alias for instruction in ready.work.instructions) <= 1
