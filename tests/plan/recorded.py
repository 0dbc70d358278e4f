"""Graphs of small programs, and what is planned for them; no device and no Triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import kitsune
from kitsune.ir import Graph, Plan
from kitsune.planning import Planner
from kitsune.scheduler import RATES, Costs
from kitsune.session import trace_regions


def record(program: Callable[[], Any], warmup: int = 0) -> Graph:
    """The one region of a program, whose result stays alive until it is flushed."""
    with trace_regions() as graphs, kitsune.accelerate(warmup=warmup, device="cpu"):
        kept = program()
    assert len(graphs) == 1
    del kept
    return graphs[0]


def recorded_again(program: Callable[[], Any]) -> Graph:
    """The one region of a program that has been observed before, so that every op of it is known."""
    for _ in range(2):
        with trace_regions() as graphs, kitsune.accelerate(warmup=1, device="cpu"):
            kept = program()
        assert len(graphs) == 1
        del kept
    return graphs[0]


def plan_of(program: Callable[[], Any], fuel: int | None = None, numerics: str = "bitwise") -> Plan:
    """The verified plan of a program's region, for an H200's rates."""
    return Planner(Costs(RATES["sm_90"]), fuel, verify=True, numerics=numerics).plan(recorded_again(program))


def launched(plan: Plan) -> list[str]:
    """What reaches the device, in order."""
    return [launch.name for launch in plan.launches if not launch.host_only]


def reasons(plan: Plan) -> set[str]:
    """Why ops were kept apart."""
    return {refusal.reason for refusal in plan.refusals}
