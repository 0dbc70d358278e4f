"""How a region's plan is printed and dumped while it is made, as KITSUNE_DEBUG and KITSUNE_DUMP ask."""

import itertools
import time
from collections.abc import Callable
from pathlib import Path

from kitsune.backends import program_of
from kitsune.config import config
from kitsune.ir import Graph, Plan
from kitsune.plan_files import at_once, planned, planned_pair
from kitsune.planning import Planner
from kitsune.profiler import Show
from kitsune.scheduler import Pair

# Whose plan is shown where none is run: the newest device of known rates.
SHOWN_ARCH = "sm_90"
# Of regions as they are shown; the runners of several threads may write into one folder.
_numbers = itertools.count()


def shows() -> Show:
    """What is to be shown now."""
    return Show(config.debug, Path(config.dump) if config.dump else None)


def show_pair(pair: Pair, planner: Planner, soon: Callable[[Callable[[], None]], None] = at_once) -> tuple[Plan, Plan] | None:
    """The plans of two parts of a region that are planned as one, if they can be; printed and dumped as regions of their own."""
    if not shows().wanted:
        return planned_pair(pair, planner, soon)
    start = time.perf_counter()
    plans = planner.plan_pair(pair, shows().region(pair.whole, next(_numbers)).passed)
    for graph, plan in zip((pair.first, pair.second), plans or (), strict=False):
        show = shows().region(graph, next(_numbers))
        show.plan(plan, time.perf_counter() - start)
        show.programs(program_of(launch) for launch in plan.launches if launch.kernels)
    return plans


def show_plan(graph: Graph, planner: Planner, soon: Callable[[Callable[[], None]], None] = at_once) -> Plan:
    """The plan of a graph, printed and dumped; `soon` is given what can be done later."""
    show = shows()
    if not show.wanted:
        return planned(graph, planner, soon)
    show = show.region(graph, next(_numbers))
    start = time.perf_counter()
    plan = planner.plan(graph, show.passed)
    show.plan(plan, time.perf_counter() - start)
    show.programs(program_of(launch) for launch in plan.launches if launch.kernels)
    return plan
