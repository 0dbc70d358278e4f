"""A program's regions run by plan, with whatever makes launches ready; and the plans, to look at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import kitsune
from kitsune.dispatch import below_autograd
from kitsune.ir import Graph, Launch, Plan
from kitsune.pipeline import Pipeline
from kitsune.planning import planner_for
from tests.runtime.checked import executor, forget


def planned(program: Callable[[], Any], start: Callable[[Launch], Any], numerics: str = "strict") -> tuple[Any, list[Plan]]:
    """What the program returns when all of its regions are run by plan, and the plans. Raises if a kernel could not be used."""
    plans: list[Plan] = []
    planner = planner_for("sm_90", numerics=numerics)

    def run(self: Pipeline, graph: Graph, values: list[Any], scalars: list[float]) -> None:
        import torch

        with below_autograd(), torch._C._DisableTorchDispatch():
            plans.append(planner.plan(graph))
            by_plan, told = executor(start)
            by_plan.run(by_plan.prepare(plans[-1]), values, scalars)
            if told:
                raise RuntimeError(told[0])

    forget()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pipeline, "run_graph", run)
        for _ in range(2):  # at first, some ops are made at once
            plans.clear()
            with kitsune.accelerate(warmup=0, device="cpu"):
                found = program()
    forget()
    return found, plans
