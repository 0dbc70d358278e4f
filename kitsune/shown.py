"""How a region's plan is printed and dumped while it is made, as KITSUNE_DEBUG and KITSUNE_DUMP ask."""

import itertools
import time
from collections.abc import Callable
from pathlib import Path

from kitsune.backends import program_of
from kitsune.config import config
from kitsune.ir import Graph, Plan
from kitsune.plan_files import at_once, planned
from kitsune.planning import Planner
from kitsune.profiler import Show

# Whose plan is shown where none is run: the newest device of known rates.
SHOWN_ARCH = "sm_90"
# Of regions as they are shown; the runners of several threads may write into one folder.
_numbers = itertools.count()


def shows() -> Show:
    """What is to be shown now."""
    return Show(config.debug, Path(config.dump) if config.dump else None)


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
