"""What takes the place of a region that is run op by op: its plan, from disk or made in the background, with its kernels."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kitsune.backends import Backend
from kitsune.background import later, wait_for
from kitsune.config import config
from kitsune.ir import Graph, LoadedPlan, Op
from kitsune.plan_files import last_plans, make_ready, may_be_kept, pair_paths, plan_path, read_plan, remember_plan
from kitsune.planning import Planner
from kitsune.ready import Ready, by_plan
from kitsune.runtime import PlanExecutor, Prepared
from kitsune.runtime.instructions import Start
from kitsune.scheduler import Pair
from kitsune.shown import show_pair, show_plan, shows

# A first step waits so long for a plan that was read ahead to be found: 15 to 24 ms for BERT's. Beside the second and third one,
# which have no room for it, it took until the fourth, and the region was captured without (H200).
LOOK_UP_S = 0.03
# Regions that are looked up on disk in vain, 0.03 s each for one like BERT's.
MAX_MISSED = 8


@dataclass(slots=True)
class Found:
    """A plan that lay on disk, made ready."""

    plan: LoadedPlan
    ready: Ready


@dataclass
class Coming:
    """Has the plans of a thread's regions read or made by the background thread, and the programs that they need."""

    executor: PlanExecutor
    backend: Backend
    device: torch.device
    program: str
    # Which operators of a region that is to come are to be run once before.
    to_try: Callable[[Graph], list[Op]]
    n_missed: int = 0
    # Has this program had plans when it last ran?
    reads_ahead: bool = False
    # Of the plans that this program had when it last ran, by their files: those that no region has asked for yet.
    ahead: dict[Path, Found] = field(default_factory=dict)

    def read_ahead(self, planner: Callable[[], Planner]) -> None:
        """Have the plans read that this program used when it last ran: the first step has its regions only at its end, and waits
        for libraries until then. So it does for what the first plan of a process needs, which would compete with the steps after
        the capture."""
        paths = [] if shows().wanted or config.verify else last_plans(self.program)
        self.reads_ahead = bool(paths)

        def make() -> tuple[None, list[Future[Any]]]:
            for path in paths:
                if (found := self._read(path, planner())) is not None:
                    self.ahead[path] = found
            make_ready()
            return None, []

        later(make)

    def look_up(self, graph: Graph, now: Ready, planner: Planner) -> None:
        """A plan that lies on disk is had before the region comes back: nothing is lost if it does not."""
        if self.n_missed >= MAX_MISSED or shows().wanted or not may_be_kept(graph):
            return

        def make() -> tuple[Ready | None, list[Future[Any]]]:
            now.found = self.kept(graph, planner)
            if now.found is None:
                self.n_missed += 1
                return None, []
            now.to_try = self.to_try(now.found.graph)
            return now.found, now.found.compiling

        may_be_there = bool(self.ahead)
        now.kept = later(make)
        if may_be_there:
            wait_for(now.kept, LOOK_UP_S)

    def kept(self, graph: Graph, planner: Planner) -> Ready | None:
        """A region by its plan from disk."""
        path = plan_path(graph, planner)
        if path is None:
            return None
        found = self.ahead.pop(path, None) or self._read(path, planner)
        if found is None:
            return None
        found.plan.of(graph)
        remember_plan(self.program, path)
        return found.ready

    def planned(self, graph: Graph, now: Ready, planner: Planner) -> Ready:
        """A region by the plan that it has on disk, or that is made now."""
        if now.found is not None:
            # Looked up before by this very thread.
            return now.found
        path = plan_path(graph, planner)
        if self.backend.expect is not None and (path is None or not path.exists()):
            self.backend.expect()
        # ResNet-50's plan takes 0.28 s to write (CPU host), in which kernels can be compiled already.
        ready = by_plan(show_plan(graph, planner, soon=_in_background), self.executor, self.device)
        ready.compiling = self.warm(ready.work)
        if path is not None:
            remember_plan(self.program, path)
        return ready

    def planned_pair(self, pair: Pair, planner: Planner) -> tuple[Ready, Ready] | None:
        """Two parts of a region by plans that fit together, which it has on disk, or which are made now, if there can be any."""
        paths = pair_paths(pair, planner)
        ahead = [self.ahead.pop(path, None) for path in paths]
        if len(ahead) == 2 and ahead[0] is not None and ahead[1] is not None:
            for found in ahead:
                found.plan.of(pair.whole)  # type: ignore[union-attr]
            return ahead[0].ready, ahead[1].ready
        if self.backend.expect is not None and not (paths and all(path.exists() for path in paths)):
            self.backend.expect()
        plans = show_pair(pair, planner, soon=_in_background)
        if plans is None:
            return None
        first, second = (by_plan(plan, self.executor, self.device) for plan in plans)
        for ready in (first, second):
            ready.compiling = self.warm(ready.work)
        for path in paths:
            remember_plan(self.program, path)
        return first, second

    def _read(self, path: Path, planner: Planner) -> Found | None:
        plan = read_plan(path)
        if plan is None:
            return None
        ready = by_plan(plan.plan.with_tiles(planner.tiles), self.executor, self.device)
        ready.compiling = self.warm(ready.work)
        return Found(plan, ready)

    def warm(self, prepared: Any) -> list[Future[Any]]:
        """Ask for the programs that a prepared plan will need."""
        assert isinstance(prepared, Prepared) and self.backend.warm is not None
        starts = [i for i in prepared.instructions if isinstance(i, Start) and i.prepared is not None]
        # Each once: launches share programs.
        return [*dict.fromkeys(future for start in starts for future in self.backend.warm(start.launch, start.prepared))]


def _in_background(call: Callable[[], None]) -> None:
    def make() -> tuple[None, list[Future[Any]]]:
        call()
        return None, []

    later(make)
