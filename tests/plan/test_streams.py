"""Streams: launches that do not need each other run beside each other, where the model says that it pays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kitsune.ir import Graph, Plan, happens_before, predecessors
from kitsune.planning import Planner
from kitsune.scheduler import RATES, Costs, Load, assign_streams, streams
from kitsune.scheduler.streams import waves
from tests.corpus import FILES, load, name_of
from tests.plan.recorded import recorded_again

WIDE = [path for path in FILES if name_of(path) in ("bert-full-amp-cuda", "vit-full-amp-cuda")]


def plan_of(graph: Graph, n_streams: int = 4) -> Plan:
    return Planner(Costs(RATES["sm_90"]), verify=True, n_streams=n_streams).plan(graph)


def two_layers(width: int) -> Callable[[], Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
    x = torch.randn(8, width)

    def step() -> Any:
        model.zero_grad()
        F.mse_loss(model(x), x).backward()
        return [p.grad for p in model.parameters()]

    return step


def streams_of(plan: Plan) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    for launch in plan.launches:
        if not launch.host_only:
            found.setdefault(launch.name, set()).add(launch.stream)
    return found


def test_the_sum_of_a_bias_runs_beside_the_product_of_its_weight() -> None:
    found = streams_of(plan_of(recorded_again(two_layers(64))))
    assert found["sum"] != {0}
    assert found["mm"] == {0}, "a second stream for products costs a workspace that is larger than this model"


def test_products_run_beside_each_other_where_a_workspace_is_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "WORTH_A_WORKSPACE", 0)
    assert streams_of(plan_of(recorded_again(two_layers(64))))["mm"] == {0, 1}


def test_with_one_stream_nothing_waits() -> None:
    plan = plan_of(recorded_again(two_layers(64)), n_streams=1)
    assert all(not launch.stream and not launch.waits for launch in plan.launches)


def test_a_wave_that_fills_the_device_stays_on_one_stream() -> None:
    plan = plan_of(recorded_again(two_layers(64)), n_streams=1)
    full = assign_streams(plan.launches, plan.graph, lambda _: Load(50.0, 50.0), 4, 1 << 40)
    assert {launch.stream for launch in full} == {0}
    # Nothing to gain but the gaps between launches.
    gaps = assign_streams(plan.launches, plan.graph, lambda _: Load(52.0, 50.0), 4, 1 << 40)
    assert {launch.stream for launch in gaps} == {0}
    empty = assign_streams(plan.launches, plan.graph, lambda _: Load(50.0, 1.0), 4, 1 << 40)
    assert {launch.stream for launch in empty} > {0, 1}


def test_no_launch_of_a_wave_needs_another_one() -> None:
    plan = plan_of(recorded_again(two_layers(64)))
    numbers = {id(op): number for number, op in enumerate(plan.graph.ops)}
    needs = predecessors(plan.graph)
    found = list(waves(plan.launches, plan.graph))
    assert sorted(k for wave in found for k in wave) == [k for k, launch in enumerate(plan.launches) if not launch.host_only]
    for wave in found:
        inside = [{numbers[id(op)] for op in plan.launches[k].ops} for k in wave]
        for one in inside:
            for other in inside:
                assert one is other or not any(needs[n] >> m & 1 for n in one for m in other)


@pytest.mark.parametrize("path", WIDE, ids=name_of)
def test_real_steps_fork_and_stay_sound(path: Any) -> None:
    # `verify` finds a launch that may start before what it needs, and bytes that are shared while both are in use.
    one, four = plan_of(load(path), 1), plan_of(load(path), 4)
    assert {launch.stream for launch in four.launches} > {0}
    assert [launch.name for launch in one.launches] == [launch.name for launch in four.launches]
    assert four.arena <= 1.02 * one.arena
    # Each wave waits for the one before: nothing is held for longer than that.
    before = happens_before(four.launches)
    on_device = [k for k, launch in enumerate(four.launches) if not launch.host_only]
    for position, k in enumerate(on_device):
        late = [m for m in on_device[: max(position - 2 * streams.WIDEST, 0)] if not before[k] >> m & 1]
        assert not late
