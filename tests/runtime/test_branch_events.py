"""The events that a graph's branches really record and wait for order what the plan orders; streams are played on the CPU."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st

from kitsune.ir import Kernel, Launch, Plan, happens_before
from kitsune.runtime import branches
from kitsune.runtime.branches import Branches
from kitsune.runtime.instructions import Drop, Instruction, StartInGraph
from tests.property.schedules import planned, random_graph, scattered
from tests.property.test_programs import SLOW


class Stream:
    """What has been put on a stream so far, with all that it comes after; an event is a copy of that."""

    cuda_stream = 0

    def __init__(self) -> None:
        self.past: set[int] = set()

    def record_event(self) -> set[int]:
        return set(self.past)

    def wait_event(self, event: set[int]) -> None:
        self.past |= event

    def wait_stream(self, other: Stream) -> None:
        self.past |= other.past


class Frame:
    stream = position = 0


class Started(StartInGraph):
    """Kernels of launch `at` that write down what has ended when they start."""

    def __init__(self, at: int, stream: Stream, seen: dict[int, set[int]]) -> None:
        Instruction.__init__(self, at=at)
        self.on, self.seen = stream, seen

    def run(self, frame: Any) -> None:
        self.seen[self.at] = set(self.on.past)
        self.on.past.add(self.at)


class Dropped(Drop):
    def __init__(self, at: int, seen: dict[int, set[int]], moments: dict[int, int]) -> None:
        Instruction.__init__(self, at=at)
        self.seen, self.moments = seen, moments

    def run(self, frame: Any) -> None:
        """How many launches were made before the memory was given back."""
        self.moments[self.at] = len(self.seen)


@contextlib.contextmanager
def played(n_streams: int) -> Iterator[list[Stream]]:
    streams = [Stream() for _ in range(n_streams)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "current_stream", lambda device: streams[0])
        patch.setattr(branches, "place_of", lambda stream: stream)
        patch.setattr(branches, "enter", lambda stream: None)
        patch.setattr(branches, "_sides", lambda device, n: streams[1 : n + 1])
        yield streams


def run(launches: tuple[Launch, ...]) -> tuple[dict[int, set[int]], dict[int, int]]:
    """What had ended when each launch started, and how many had been made when what each one dropped was given back."""
    seen: dict[int, set[int]] = {}
    moments: dict[int, int] = {}
    with played(1 + max(launch.stream for launch in launches)) as streams:
        instructions: list[Instruction] = []
        for k, launch in enumerate(launches):
            if not launch.host_only and not launch.is_empty:
                instructions.append(Started(k, streams[launch.stream], seen))
                instructions.append(Dropped(k, seen, moments))
        Branches(launches, torch.device("cuda")).run(instructions, Frame())  # type: ignore[arg-type]
    return seen, moments


def with_empty_ones(plan: Plan, rng: random.Random) -> tuple[Launch, ...]:
    """Some of the launches over no elements, as those of a batch of size 0: they are ordered, but not made."""
    empty = Kernel("none", (0,), (), (), ())
    return tuple(
        launch if launch.host_only or rng.random() < 0.6 else replace(launch, op=None, kernels=(empty,))
        for launch in plan.launches
    )


@settings(SLOW)
@given(seed=st.integers(0, 2**32 - 1), n_streams=st.integers(2, 4), in_waves=st.booleans())
def test_what_the_plan_orders_the_events_order(seed: int, n_streams: int, in_waves: bool) -> None:
    rng = random.Random(seed)
    plan = planned(random_graph(seed), n_streams if in_waves else 1)
    launches = with_empty_ones(plan if in_waves else scattered(plan, rng, n_streams), rng)
    if all(launch.host_only or launch.is_empty for launch in launches):
        return
    seen, moments = run(launches)
    made = list(seen)
    for k, before in enumerate(happens_before(launches)):
        if k in seen:
            assert {n for n in made if before >> n & 1} <= seen[k]
    for k, moment in moments.items():
        # Whoever comes after it may be given the memory, and comes after all who may still use it.
        users = {n for n in made if n <= k}
        assert all(users <= seen[later] for later in made[moment:])


def test_who_waits_for_what_is_not_made_waits_for_what_that_waits_for() -> None:
    made = Kernel("some", (4,), (), (), ())
    none = Kernel("none", (0,), (), (), ())
    launches = (
        Launch((made,), stream=2),
        Launch((none,), stream=0, waits=(0,)),
        Launch((none,), stream=1),
        Launch((made,), stream=1, waits=(1,)),
        Launch((made,), stream=0),
    )
    seen, _ = run(launches)
    assert seen == {0: set(), 3: {0}, 4: {0}}
