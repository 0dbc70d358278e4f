"""Ops that take a moving number and are no kernels: the graph ends before them, and they are called after each replay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kitsune
from kitsune.config import config
from kitsune.runtime import graph_work
from tests.runtime.backends import assert_equal, lazily
from tests.runtime.repeated import counts, graphs
from tests.runtime.test_cold_start import cold

WAYS = pytest.mark.parametrize("kernels, fuse", [(True, True), (True, False), (False, True)])


def train(context: Any, steps: int = 14, groups: int = 1, hold: bool = False) -> list[torch.Tensor]:
    """Fused Adam with weight decay, which is no kernel in strict numerics, under a cosine schedule."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Linear(16, 3))
    parameters = list(model.parameters())
    given = [{"params": parameters[k::groups]} for k in range(groups)]
    optimizer = torch.optim.Adam(given, lr=1e-2, weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    x, target, kept = torch.randn(8, 6), torch.arange(8) % 3, []
    with context:
        for _ in range(steps):
            hidden = model[:2](x)
            loss = F.cross_entropy(model[2:](hidden), target)
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            kept.append(loss.detach())
            if hold:
                kept.append(hidden)
    state = [value for entry in optimizer.state.values() for value in entry.values()]
    return [*(k.detach() for k in kept), *model.parameters(), *model.buffers(), *state]


@pytest.mark.parametrize("how", [{}, {"groups": 2}, {"hold": True}], ids=str)
@WAYS
def test_a_cosine_schedule_with_fused_adam_stays_captured(kernels: bool, fuse: bool, how: dict[str, Any]) -> None:
    expected = train(kitsune.disable(), **how)
    with graphs(kernels), config.patch(fuse=fuse):
        assert_equal(train(lazily(), **how), expected)
        captured, replayed, refused, missed = counts("captured", "replayed", "graph_refused", "graph_missed")
        assert not refused and captured <= 2 and replayed >= 8, kitsune.counters()
        assert not any("changes from run to run" in reason for reason in missed)


def test_what_waits_for_kernels_is_captured_while_its_numbers_move() -> None:
    expected = train(kitsune.disable())
    with cold(graphs=True) as (workers, _):
        assert_equal(train(lazily()), expected)
        assert counts("kernels") == [0] and counts("replayed")[0] >= 8
        workers.release()
        replayed = counts("replayed")[0]
        assert_equal(train(lazily()), expected)
        assert counts("kernels")[0] > 0 and counts("replayed")[0] - replayed >= 8 and not counts("graph_refused")[0]


def scaled(factor: float, n_after: int) -> torch.Tensor:
    y = torch.ones(3, 3) * factor
    for _ in range(n_after):
        y = y @ y.new_full((3, 3), 0.25)
    return y.sum()


def test_a_number_that_moves_early_in_a_long_region_refuses_with_its_line() -> None:
    with graphs(kernels=False):
        for k in range(12):
            with lazily():
                got = scaled(1.0 + k, 60)
            assert torch.equal(got, scaled(1.0 + k, 60))
        (reason,) = counts("graph_refused")[0]
        assert "aten.mul" in reason and "changes from run to run" in reason and "test_tail.py" in reason


def test_what_makes_a_result_of_the_region_is_no_tail() -> None:
    with graphs(kernels=False):
        for k in range(12):
            with lazily():
                got = scaled(1.0 + k, 1)
            assert torch.equal(got, scaled(1.0 + k, 1))
        captured, replayed, refused = counts("captured", "replayed", "graph_refused")
        # The number is baked in a few times, in case it has come to rest.
        assert captured == replayed <= 3 and len(refused) == 1


def test_an_error_in_the_tail_is_the_programs_and_nothing_is_run_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    state, ran = torch.zeros(4), []
    run = graph_work.replay

    def watched(schedule: Any, values: Any, scalars: Any) -> None:
        ops = [i.op.target._opname for i in schedule.instructions]
        ran.append(ops)
        if ops == ["add_"] and len(ran) > 4:
            raise RuntimeError("no such number")
        run(schedule, values, scalars)

    def step(k: int) -> None:
        with lazily():
            state.mul_(2)
            state.add_(1.0 + k)

    expected = torch.zeros(4)
    with graphs(kernels=False) as repeater:
        monkeypatch.setattr(graph_work, "replay", watched)
        for k in range(20):
            before, n_ran = expected.clone(), len(ran)
            try:
                step(k)
            except RuntimeError as error:
                assert "no such number" in str(error)
                break
            expected = before * 2 + (1.0 + k)
            assert torch.equal(state, expected)
        else:
            pytest.fail("the tail has not failed")
        # The graph once, and its tail, which failed.
        assert ran[n_ran:] == [["mul_"], ["add_"]] and torch.equal(state, before * 2) and repeater.n_alive == 0
        monkeypatch.undo()
        state.copy_(expected)
