"""What takes the place of a region that is run op by op: its plan, from disk or made in the background, with its kernels."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kitsune.backends import Backend
from kitsune.background import soon
from kitsune.ir import Graph, Op
from kitsune.last_run import LastRun
from kitsune.plan_files import pair_paths, plan_path, read_ahead
from kitsune.planning import Planner
from kitsune.ready import Ready, by_plan
from kitsune.runtime import GraphFacts, PlanExecutor, Prepared, ThreadPlans
from kitsune.runtime.instructions import Start
from kitsune.scheduler import Pair
from kitsune.shown import show_pair, show_plan, shows

# A plan that was made ready before its graph was there, and what gives it the graph's lines.
Ahead = tuple[Ready, Callable[[Graph], None]]
# Times that a region is looked up among these in vain, each 0.02 s of the background thread for BERT's, until they are dropped.
MOST_MISSED = 16


class Coming:
    """Has the plans of a thread's regions read or made by the background thread, and the programs that they need."""

    def __init__(self, executor: PlanExecutor, backend: Backend, device: torch.device, thread_plans: ThreadPlans) -> None:
        self.executor, self.backend, self.device, self._thread_plans = executor, backend, device, thread_plans
        self.forget()

    def forget(self) -> None:
        """The program is over: drop what nobody has come for."""
        self._last_run = LastRun(self.backend.bring)
        self._drop_ahead()

    def _drop_ahead(self) -> None:
        # Another one: what is on its way goes into the one before.
        self._ahead: dict[Path, Ahead] = {}
        self._n_missed = 0

    @property
    def is_ahead(self) -> bool:
        """Was a plan made ready for a graph that has not come yet?"""
        return bool(self._ahead)

    def begins(self, first: Sequence[Op], planner: Planner) -> None:
        """The program begins with these: what it has needed the last time is made beside its first step. That is mostly the
        loading of libraries, which leaves Python and the device idle."""
        # A recorder that knows too many ops forgets them, and says so in the middle of a program. And where plans are shown, each
        # region is planned before the user's eyes.
        if self._last_run.is_known or shows().wanted:
            return
        convolutions, plans = self._last_run.begins(first)
        self._thread_plans.foresee(convolutions)
        for path in plans:
            soon(partial(self._read_ahead, path, planner, self._ahead))

    def made(
        self, graph: Graph, now: Ready, planner: Planner, fuses: bool, hopes: bool
    ) -> tuple[Ready | None, list[Future[Any]]]:
        """What takes a region's place, and what that waits for. With `hopes` it may be nothing."""
        made = self.planned(graph, planner, hopes) if fuses else self.with_numbers(now, planner)
        if made is None:
            return None, []
        # It comes, and need not be asked for once more.
        now.to_try, now.hopes = self.to_try(made), False
        return made, made.compiling

    def planned(self, graph: Graph, planner: Planner, hopes: bool = False) -> Ready | None:
        """A region by the plan that was made ahead; or, unless one only `hopes` for it, that it has on disk, or that is made
        now."""
        path = plan_path(graph, planner)
        if (ready := self._taken(path, graph)) is not None:
            return ready
        if hopes:
            self._n_missed += 1
            if self._n_missed == MOST_MISSED:
                self._drop_ahead()
            return None
        if self.backend.expect is not None and (path is None or not path.exists()):
            self.backend.expect()
        # ResNet-50's plan takes 0.28 s to write (CPU host), in which kernels can be compiled already.
        ready = by_plan(show_plan(graph, planner, soon), self.executor, self.device)
        ready.compiling, ready.file = self.warm(ready.work), path
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
        if len(paths) == 2 and all(path in self._ahead for path in paths):
            first, second = (self._taken(path, pair.whole) for path in paths)
            if first is not None and second is not None:
                return first, second
        if self.backend.expect is not None and not (paths and all(path.exists() for path in paths)):
            self.backend.expect()
        plans = show_pair(pair, planner, soon)
        if plans is None:
            return None
        first, second = (by_plan(plan, self.executor, self.device) for plan in plans)
        for ready, path in zip((first, second), paths or (None, None), strict=True):
            ready.compiling, ready.file = self.warm(ready.work), path
        return first, second

    def to_try(self, ready: Ready) -> list[Op]:
        """Operators of a region that is to come that are to be run once before."""
        needed = self._thread_plans.needed(ready.graph)
        self._last_run.needs_convolutions(needed)
        return needed

    def warm(self, prepared: Any) -> list[Future[Any]]:
        """Ask for the programs that a prepared plan will need."""
        assert isinstance(prepared, Prepared) and self.backend.warm is not None
        asked = [future for start in _starts(prepared) for future in self.backend.warm(start.launch, start.prepared)]
        # Each once: launches share programs.
        return [*dict.fromkeys(asked)]

    def keep(self, regions: Iterable[Ready]) -> None:
        """Have what these need read and loaded in the program's next run before it is asked for."""
        last_run = self._last_run
        if not last_run.is_known:
            return
        by_plans = [ready for ready in regions if isinstance(ready.work, Prepared)]
        usable = [start.prepared for ready in by_plans for start in _starts(ready.work)]
        plans = [ready.file.name for ready in by_plans if ready.file is not None]
        # Kernels as they come: those of the first launches are asked for first.
        soon(lambda: last_run.needs([*dict.fromkeys(filter(None, map(self.backend.file_of, usable)))], plans))

    def _read_ahead(self, path: Path, planner: Planner, ahead: dict[Path, Ahead]) -> None:
        if ahead is self._ahead and (found := read_ahead(path)) is not None:
            plan, give_lines = found
            ready = by_plan(plan.with_tiles(planner.tiles), self.executor, self.device)
            ready.compiling, ready.file = self.warm(ready.work), path
            ahead[path] = ready, give_lines

    def _taken(self, path: Path | None, graph: Graph) -> Ready | None:
        """What was made ready for a graph."""
        found = None if path is None else self._ahead.pop(path, None)
        if found is None:
            return None
        ready, give_lines = found
        try:
            give_lines(graph)
        except IndexError:  # of another graph
            return None
        if ready.facts is not None and ready.facts.refusal is not None:
            # It names a line.
            ready.facts = GraphFacts(ready.graph, self.device, ready.facts.places)
        return ready


def _starts(prepared: Any) -> list[Start]:
    return [i for i in prepared.instructions if isinstance(i, Start) and i.prepared is not None]
