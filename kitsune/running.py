"""How regions are run on a device: by plan with kernels where there is a GPU and Triton, op by op elsewhere."""

import warnings
import weakref
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from kitsune.backends import Backend, backend_of, pool_budget, recorder_of, workers
from kitsune.background import later
from kitsune.benefits import gains_enough
from kitsune.codegen import WorkerFailed
from kitsune.config import KitsuneWarning, config
from kitsune.engine_options import DEFAULT, EngineOptions
from kitsune.ir import Graph, reads_slots
from kitsune.memory import MemoryPool
from kitsune.planning import Planner, planner_for, slot_planner_for
from kitsune.profiler import PlanTally, Tally, plan_tally
from kitsune.runtime import (
    Arenas,
    PlanExecutor,
    Prepared,
    Schedule,
    SlotTable,
    Steady,
    SteadyState,
    Work,
    adopt_views,
    current_stream,
    numeric_settings,
    plan_work,
    prepare,
    replay,
    schedule_work,
    views_of_inputs,
)
from kitsune.runtime.instructions import Start
from kitsune.scheduler import dead_code, run_passes
from kitsune.shown import show_plan, shows

# Regions kept ready to run; a program that never repeats has no end of them.
MAX_READY = 1024
# Whose plan is shown where none is run: the newest device of known rates.
SHOWN_ARCH = "sm_90"
# Runs after which a plan is made in the background. While a step is recorded, learned and followed for the first time its region
# is another each time; and planning BERT's takes 0.4 s of Python, which the steps until the capture need themselves.
PLAN_AFTER = 3


@dataclass(slots=True)
class Ready:
    """A region, ready to run: by plan, or op by op. `graph` has what is run of it."""

    work: Prepared | Schedule
    plan: PlanTally | None
    n_ops: int
    n_dead: int
    graph: Graph
    # Outputs that lie in an input's memory.
    views: tuple[int, ...] = ()
    steady: Steady | None = None
    # Of a region that is run op by op: kernels for what takes moving numbers, which its CUDA graph needs.
    in_graph: Prepared | None = None
    # Is another way to run it to be made in the background? What takes its place, once it is there, and what that waited for.
    waits: bool = False
    coming: "Future[Ready] | None" = None
    asked: list[Future[Any]] = field(default_factory=list)
    n_runs: int = 0


class Runner:
    """Runs the regions of one thread on one device: by plan where there is a backend, op by op elsewhere."""

    def __init__(self, device: torch.device, tally: Tally, options: EngineOptions = DEFAULT) -> None:
        self.tally, self.options = tally, options
        self.ready: dict[Any, Ready] = {}
        # What went wrong and was mended in the run that is going on; said when it has ended.
        self.sentences: list[str] = []
        self.executor: PlanExecutor | None = None
        self.pool: MemoryPool | None = None
        self.steady: SteadyState | None = None
        runners.add(self)
        backend, recorder = backend_of(device), recorder_of(device)
        self.backend = backend
        # A quarter of the device's memory.
        self._budget = pool_budget(device) if recorder is not None or isinstance(backend, Backend) else 0
        if recorder is not None:
            self.steady = SteadyState(device, recorder, self._limits, self._relieve, self.sentences.append, tally)
        if isinstance(backend, Backend):
            self.arch = backend.arch
            self.pool = MemoryPool(options.pool_bytes or self._budget)
            self.executor = PlanExecutor(backend.prepare_launch, self.pool, self.sentences.append)
            self.arenas = Arenas(self.executor.pool)
        elif device.type == "cuda":
            self.sentences.append(backend)

    def run(self, graph: Graph, values: list[Any], scalars: list[float]) -> Ready:
        """Run a closed region: `values` has the inputs by number and receives the outputs. Returns what was run of it."""
        key = (graph, *self.options.knobs, numeric_settings() if self.steady is not None else None)
        ready = self.ready.get(key)
        if ready is None:
            if len(self.ready) >= MAX_READY:
                self.forget()
            ready = self.ready[key] = self._prepare(graph)
        elif ready.coming is not None and ready.coming.done():
            ready = self.ready[key] = self._arrived(graph, ready, ready.coming)
        self.tally.ran(ready.n_ops, ready.n_dead, ready.plan, ready.waits)
        try:
            if self._replayed(ready, values, scalars):
                pass
            elif isinstance(ready.work, Schedule):
                replay(ready.work, values, scalars)
            else:
                assert self.executor is not None
                self.executor.run(ready.work, values, scalars)
            adopt_views(ready.views, values)
        except BaseException as error:
            self._say(error)
            raise
        finally:
            if self.executor is not None and not config.pool:
                self.executor.pool.free_all()
        ready.n_runs += 1
        if ready.n_runs == PLAN_AFTER:
            self._ask(graph, ready)
        self._say()
        return ready

    def ask_all(self) -> None:
        """Have made what is to be made in the background, also of regions that have not come back."""
        for (graph, *knobs, _), ready in list(self.ready.items()):
            if tuple(knobs) == self.options.knobs:
                self._ask(graph, ready)

    def forget(self) -> None:
        """Drop every plan and every graph, and the memory kept for them."""
        self.ready.clear()
        if self.steady is not None:
            self.steady.forget()
        if self.executor is not None:
            self.executor.pool.free_all()

    def _prepare(self, graph: Graph) -> Ready:
        if self._in_background():
            ready = self._unfused(graph)
            slots = self.steady is not None and self.options.captures and any(map(reads_slots, ready.graph.ops))
            ready.waits = self.options.fuses or slots
            return ready
        if self.options.fuses:
            try:
                if self.executor is not None:
                    return self._worthwhile(graph, self._planned(graph, self.planner()))
                if shows().wanted:
                    show_plan(graph, self.planner(SHOWN_ARCH))
            except Exception as error:
                if config.verify:
                    raise
                self._unplanned(graph, error)
        return self._unfused(graph)

    def planner(self, arch: str | None = None) -> Planner:
        """What plans the regions that run here."""
        return planner_for(arch or self.arch, self.options.rules, self.options.grade, self.options.n_streams)

    def _in_background(self) -> bool:
        return isinstance(self.backend, Backend) and self.backend.warm is not None and workers() is not None

    def _unfused(self, graph: Graph) -> Ready:
        alive = run_passes(graph, (dead_code,), config.verify)
        return Ready(prepare(alive), None, len(alive.ops), len(graph.ops) - len(alive.ops), alive, views_of_inputs(alive))

    def _planned(self, graph: Graph, planner: Planner) -> Ready:
        assert self.executor is not None
        plan = show_plan(graph, planner)
        n_ops = sum(len(launch.ops) for launch in plan.launches)
        n_dead = len(graph.ops) - len(dead_code(graph).ops)
        return Ready(self.executor.prepare(plan), plan_tally(plan), n_ops, n_dead, plan.graph, views_of_inputs(plan.graph))

    def _worthwhile(self, graph: Graph, made: Ready) -> Ready:
        """The plan without the kernels that are measured to gain too little, where a context asks for that."""
        assert self.executor is not None
        planner = self.planner(self.arch)
        if made.plan is None or gains_enough(made.plan.plan, planner, self.executor):
            return made
        return self._planned(graph, planner)

    def _ask(self, graph: Graph, now: Ready) -> None:
        """Have a region's plan made in the background, and the kernels for it. Nobody waits for it."""
        executor, fuse = self.executor, self.options.fuses
        if not now.waits or now.coming is not None:
            return
        assert executor is not None
        # With the knobs of now.
        planner = self.planner() if fuse else slot_planner_for(self.arch, self.options.n_streams)

        def make() -> tuple[Ready, list[Future[Any]]]:
            if fuse:
                made = self._planned(graph, planner)
                prepared = made.work
            else:
                prepared = executor.prepare(planner.plan(now.graph))
                made = Ready(now.work, None, now.n_ops, now.n_dead, now.graph, now.views, in_graph=prepared)
            assert isinstance(prepared, Prepared)
            made.asked = self._warm(prepared)
            return made, made.asked

        now.coming = later(make)

    def _warm(self, prepared: Prepared) -> list[Future[Any]]:
        assert isinstance(self.backend, Backend) and self.backend.warm is not None
        starts = [i for i in prepared.instructions if isinstance(i, Start) and i.prepared is not None]
        return [future for start in starts for future in self.backend.warm(start.launch, start.prepared)]

    def _arrived(self, graph: Graph, ready: Ready, coming: Future[Ready]) -> Ready:
        """A region's plan and kernels are there, or will not be."""
        ready.coming, ready.waits, new = None, False, ready
        try:
            made = coming.result()
            if failed := [error for future in made.asked if isinstance(error := future.exception(), WorkerFailed)]:
                raise failed[0]
            new, made.asked = self._worthwhile(graph, made), []
        except WorkerFailed as error:
            self.sentences.append(
                f"A region of {ready.n_ops} operators stays unfused, because its kernels could not be compiled. {error} "
                "With KITSUNE_COMPILE_WORKERS=0 kernels are compiled in the program's own process."
            )
        except Exception as error:
            if config.verify:
                raise
            self._unplanned(ready.graph, error)
        if ready.steady is not None and self.steady is not None:
            new.steady = self.steady.region(new.graph, lambda *of: self._work(new, *of), before=ready.steady)
        if config.debug and new.plan is not None:
            shows().fused(new.n_ops, new.plan.n_kernels)
        return new

    def _unplanned(self, graph: Graph, error: Exception) -> None:
        self.sentences.append(
            f"A region of {len(graph.ops)} operators could not be planned and is run op by op ({type(error).__name__}: {error}). "
            "This is a bug in Kitsune: please report it."
        )

    def _replayed(self, ready: Ready, values: list[Any], scalars: list[float]) -> bool:
        """Was the region run as a CUDA graph?"""
        if self.steady is None or not self.options.captures:
            return False
        if ready.steady is None:
            ready.steady = self.steady.region(ready.graph, lambda *of: self._work(ready, *of), ready.waits)
        n_captured = self.tally.n_captured
        done = self.steady.run(ready.steady, values, scalars)
        if config.debug and self.tally.n_captured > n_captured and ready.steady.captured is not None:
            shows().captured(ready.n_ops, ready.steady.captured.nbytes)
        return done

    def _work(self, ready: Ready, table: SlotTable, moved: frozenset[int]) -> Work:
        """What is captured of a region. Only kernels can read moving numbers from memory."""
        backend, prepared = self.backend, ready.work
        if isinstance(prepared, Schedule):
            if ready.in_graph is None and isinstance(backend, Backend) and not self._in_background():
                ready.in_graph = self._slot_plan(ready.graph)
            if ready.in_graph is None:
                return schedule_work(prepared, table, ready.graph, moved)
            prepared = ready.in_graph
        assert isinstance(backend, Backend) and self.executor is not None
        in_graph = backend.prepare_in_graph or (lambda launch, usable, table: usable)
        return plan_work(self.executor, prepared, in_graph, table, self.arenas, current_stream(prepared.device), moved)

    def _slot_plan(self, graph: Graph) -> Prepared | None:
        assert self.executor is not None
        planner = slot_planner_for(self.arch, self.options.n_streams)
        return self.executor.prepare(planner.plan(graph)) if any(map(reads_slots, graph.ops)) else None

    def _limits(self) -> tuple[int, int]:
        return config.max_graphs, config.graph_memory or 2 * self._budget

    def _relieve(self, hard: bool) -> None:
        if self.executor is not None:
            self.executor.pool.free_all()
        if hard and torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def _say(self, error: BaseException | None = None) -> None:
        """Warn of what was mended. Where warnings are errors, none takes the place of the `error` that ended the run."""
        while self.sentences:
            sentence = self.sentences.pop(0)
            self.tally.mended.append(sentence)
            try:
                warnings.warn(sentence, KitsuneWarning, stacklevel=2)
            except KitsuneWarning:
                if error is None:
                    raise


# Of all threads; `wait_for_kernels` asks them.
runners: "weakref.WeakSet[Runner]" = weakref.WeakSet()
