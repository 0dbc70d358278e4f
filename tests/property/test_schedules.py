"""No plan leaves two launches races that touch the same bytes, and no wait that is left out goes unseen."""

from __future__ import annotations

import random
from functools import cache

import pytest
from hypothesis import given, settings, strategies as st

from kitsune.ir import Plan, verify_plan
from tests.corpus import FILES, load, name_of
from tests.property.schedules import (
    conflicts,
    counted,
    left_out,
    planned,
    races,
    random_graph,
    scattered,
    waits_of,
)
from tests.property.test_programs import SLOW

# One recorded step of each model: of the real size, where a graph of it is small enough to be in the corpus.
STEPS = (
    "mlp-small-amp-cpu lenet-small-amp-cpu resnet18-small-amp-cuda resnet50-full-amp-cuda vit-full-amp-cuda bert-full-amp-cuda "
    "gpt2-full-amp-cuda"
).split()
# Waits of a recorded step that are left out, one at a time: each takes 0.1 to 0.2 s in the large ones.
FEW = 5
SEEDS = st.integers(0, 2**32 - 1)
n_missed: list[int] = []


@settings(SLOW)
@given(seed=SEEDS)
def test_no_wait_of_a_random_plan_is_left_out_unseen(seed: int) -> None:
    counts = counted(seed)
    assert not counts["unsound"]
    assert not counts["wrong"]
    n_missed.append(counts["needed"])


def test_waits_were_left_out() -> None:
    assert sum(n_missed) > 5 * len(n_missed) > 0, "the test before has left nothing out"


@settings(SLOW)
@given(seed=SEEDS, n_streams=st.integers(2, 4))
def test_where_launches_wait_for_what_they_need_alone_every_wait_is_needed_or_implied(seed: int, n_streams: int) -> None:
    plan = scattered(planned(random_graph(seed), 1), random.Random(seed), n_streams)
    counts = left_out(plan, waits_of(plan))
    assert not counts["spare"]
    assert counts["caught"] == counts["needed"]


@cache
def recorded(name: str) -> Plan:
    (path,) = (path for path in FILES if name_of(path) == name)
    return planned(load(path), 4)


@pytest.mark.parametrize("name", STEPS)
def test_recorded_steps_leave_nothing_unordered(name: str) -> None:
    plan = recorded(name)
    verify_plan(plan)
    assert not races(plan, conflicts(plan))
    counts = left_out(plan, random.Random(1).sample(waits_of(plan), FEW))
    assert counts["needed"] == counts["caught"]
    assert not counts["wrong"]


@pytest.mark.parametrize("name", STEPS)
def test_no_wait_of_a_recorded_step_on_streams_drawn_at_random_is_left_out_unseen(name: str) -> None:
    plan = scattered(recorded(name), random.Random(2), 3)
    verify_plan(plan)
    counts = left_out(plan, random.Random(3).sample(waits_of(plan), FEW))
    assert counts["needed"] == counts["caught"] > 0
    assert not counts["spare"] and not counts["wrong"]
