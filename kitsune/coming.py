"""What takes the place of a region that is run op by op: its plan, from disk or made in the background, with its kernels."""

from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch

from kitsune.backends import Backend
from kitsune.background import soon
from kitsune.ir import Graph, Op
from kitsune.last_run import LastRun
from kitsune.plan_files import pair_paths, plan_path
from kitsune.planning import Planner
from kitsune.ready import Ready, by_plan
from kitsune.runtime import PlanExecutor, Prepared
from kitsune.runtime.instructions import Start
from kitsune.scheduler import Pair
from kitsune.shown import show_pair, show_plan


@dataclass
class Coming:
    """Has the plans of a thread's regions read or made by the background thread, and the programs that they need."""

    executor: PlanExecutor
    backend: Backend
    device: torch.device
    # Which operators of a region that is to come are to be run once before.
    to_try: Callable[[Graph], list[Op]]
    last_run: LastRun

    def planned(self, graph: Graph, planner: Planner) -> Ready:
        """A region by the plan that it has on disk, or that is made now."""
        path = plan_path(graph, planner)
        if self.backend.expect is not None and (path is None or not path.exists()):
            self.backend.expect()
        # ResNet-50's plan takes 0.28 s to write (CPU host), in which kernels can be compiled already.
        ready = by_plan(show_plan(graph, planner, soon), self.executor, self.device)
        ready.compiling = self.warm(ready.work)
        return ready

    def with_numbers(self, now: Ready, planner: Planner) -> Ready:
        """A region that stays as it is, with the kernels that its CUDA graph needs for moving numbers."""
        prepared = self.executor.prepare(planner.plan(now.graph))
        made = Ready(now.work, None, now.n_ops, now.n_dead, now.graph, now.views, now.awaited, now.facts)
        made.in_graph, made.compiling = prepared, self.warm(prepared)
        return made

    def planned_pair(self, pair: Pair, planner: Planner) -> tuple[Ready, Ready] | None:
        """Two parts of a region by plans that fit together, which it has on disk, or which are made now, if there can be any."""
        paths = pair_paths(pair, planner)
        if self.backend.expect is not None and not (paths and all(path.exists() for path in paths)):
            self.backend.expect()
        plans = show_pair(pair, planner, soon)
        if plans is None:
            return None
        first, second = (by_plan(plan, self.executor, self.device) for plan in plans)
        for ready in (first, second):
            ready.compiling = self.warm(ready.work)
        return first, second

    def warm(self, prepared: Any) -> list[Future[Any]]:
        """Ask for the programs that a prepared plan will need."""
        assert isinstance(prepared, Prepared) and self.backend.warm is not None
        # Each once: launches share programs.
        return [
            *dict.fromkeys(future for start in _starts(prepared) for future in self.backend.warm(start.launch, start.prepared))
        ]

    def keep_kernels(self, regions: Iterable[Ready]) -> None:
        """Have the kernels of these loaded in the program's next run before they are asked for."""
        if not self.last_run.is_known:
            return
        usable = [start.prepared for ready in regions if isinstance(ready.work, Prepared) for start in _starts(ready.work)]
        # As they come: those of the first kernels are asked for first.
        soon(lambda: self.last_run.needs_kernels([*dict.fromkeys(filter(None, map(self.backend.file_of, usable)))]))


def _starts(prepared: Prepared) -> list[Start]:
    return [i for i in prepared.instructions if isinstance(i, Start) and i.prepared is not None]
