"""How regions are run on a device: by plan with kernels where there is a GPU and Triton, op by op elsewhere."""

import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import torch

from kitsune.backends import Backend, backend_of, pool_budget, reader_of, recorder_of, workers
from kitsune.background import later, thread
from kitsune.benefits import gains_enough
from kitsune.codegen import WorkerFailed
from kitsune.coming import Coming
from kitsune.config import config
from kitsune.engine_options import DEFAULT, EngineOptions
from kitsune.ir import Graph, Op
from kitsune.memory import MemoryPool
from kitsune.pairs import Pairs
from kitsune.planning import Planner, planner_for, slot_planner_for
from kitsune.profiler import Tally
from kitsune.ready import Ready, by_plan, runs_by_ops, stays_unfused, tell, try_tiles, unfused
from kitsune.runtime import (
    Answers,
    Arenas,
    Captured,
    GraphFacts,
    PlanExecutor,
    Schedule,
    SlotTable,
    Steady,
    SteadyState,
    ThreadPlans,
    Work,
    adopt_views,
    give_back,
    numeric_settings,
    plan_work,
    replay,
    schedule_work,
)
from kitsune.shown import SHOWN_ARCH, show_plan, shows
from kitsune.tuning import Tuner

# Regions kept ready to run; a program that never repeats has no end of them.
MAX_READY = 1024
# Runs after which a plan is made in the background. The first steps may have another region each; BERT's takes 0.4 s of Python,
# which the steps until the capture need, and two behind it: an MLP's fourth takes 1.2 ms, and its sixth 0.6 (H200).
PLAN_AFTER = 4


class Runner:
    """Runs the regions of one thread on one device: by plan where there is a backend, op by op elsewhere."""

    def __init__(self, device: torch.device, tally: Tally, options: EngineOptions = DEFAULT) -> None:
        self.device, self.tally, self.options, self.thread = device, tally, options, threading.get_ident()
        self.ready: dict[Any, Ready] = {}
        # What went wrong and was mended in the run that is going on; said when it has ended.
        self.sentences: list[str] = []
        self.executor: PlanExecutor | None = None
        self.pool: MemoryPool | None = None
        self.steady: SteadyState | None = None
        self.tuner: Tuner | None = None
        self.coming: Coming | None = None
        self.pairs = Pairs(self)
        runners.add(self)
        self.backend = backend = backend_of(device)
        recorder = recorder_of(device)
        self.thread_plans = ThreadPlans(hands_over=recorder is not None and options.captures)
        self._budget = pool_budget(device) if recorder is not None or isinstance(backend, Backend) else 0
        if recorder is not None:
            limits, told = lambda: (config.max_graphs, config.graph_memory or 2 * self._budget), self.sentences.append
            self.steady = SteadyState(device, recorder, limits, lambda: reader_of(backend), self.relieve, told, tally)
        if isinstance(backend, Backend):
            self.arch = backend.arch
            self.pool = MemoryPool(options.pool_bytes or self._budget, give_back)
            self.executor = PlanExecutor(backend.prepare_launch, self.pool, self.sentences.append, self.let_go)
            self.arenas = Arenas(self.executor.pool)
            if backend.choices is not None:
                self.tuner = Tuner(backend, lambda nbytes: self.arenas.scratch(nbytes, device), tally, device)
            if backend.warm is not None:
                self.coming = Coming(self.executor, backend, device, self.thread_plans)
                if self.in_background():
                    thread.start()
        elif device.type == "cuda":
            self.sentences.append(backend)

    def run(self, graph: Graph, values: list[Any], scalars: list[float]) -> Answers | None:
        """Run a closed region: `values` has the inputs by number and receives the outputs, of which the answers know early."""
        key = self.key(graph)
        ready = self.ready.get(key) or self._met(key, graph)
        if (coming := ready.arrived()) is not None:
            ready = self.ready[key] = self._arrived(graph, ready, coming)
            if self.coming is not None:
                self.coming.keep(self.ready.values())
        self.tally.ran(ready.n_ops, ready.n_dead, ready.plan, ready.waits)
        try:
            if (captured := self._replayed(ready, values, scalars)) is not None:
                self._tune(ready)
            elif isinstance(ready.work, Schedule):
                replay(ready.work, values, scalars, self.let_go)
            else:
                assert self.executor is not None
                self.executor.run(ready.work, values, scalars)
            adopt_views(ready.views, values)
        except BaseException as error:
            tell(self.sentences, self.tally, error)
            raise
        finally:
            if self.executor is not None and not config.pool:
                self.executor.pool.free_all()
        ready.n_runs += 1
        # Also later than that: an interrupt may have come instead.
        if ready.waits and (ready.n_runs >= PLAN_AFTER or (self.coming is not None and self.coming.is_ahead)):
            self.ask(graph, ready, hopes=ready.n_runs < PLAN_AFTER)
        if ready.to_try:
            self.thread_plans.go_on(ready.to_try)
        tell(self.sentences, self.tally)
        return None if captured is None else captured.answers(values)

    def key(self, graph: Graph) -> tuple[Any, ...]:
        """What a region is kept by, ready to run."""
        return graph, *self.options.knobs, numeric_settings() if self.steady is not None else None

    def expect(self, graph: Graph) -> None:
        """A region was observed: what its first run needs is made now, where it is little: 9 ms of BERT's second step (H200)."""
        if (self.in_background() or self.executor is None) and (key := self.key(graph)) not in self.ready:
            self._met(key, graph)
        if self.steady is not None:
            self.thread_plans.make(graph)

    def _met(self, key: Any, graph: Graph) -> Ready:
        """A region that is new here."""
        if len(self.ready) >= MAX_READY:
            self.forget()
        ready = self.ready[key] = self._prepare(graph)
        if self.steady is not None and self.options.captures:
            ready.steady = self.steady_of(ready)
        return ready

    def ask_all(self) -> None:
        """Have made what is to be made in the background, also of regions that have not come back."""
        for (graph, *knobs, _), ready in list(self.ready.items()):
            if tuple(knobs) == self.options.knobs:
                self.ask(graph, ready)

    def spread_nothing(self) -> None:
        """What is there now is run next time: what its thread needs for that is made at once if it is this one."""
        for ready in list(self.ready.values()):
            if self.thread == threading.get_ident():
                self.thread_plans.make_all(ready.to_try)
            ready.to_try = []
        if self.thread == threading.get_ident():
            self.pairs.spread_nothing()

    def tune_all(self, until: float) -> None:
        """Try the tiles of every region that is replayed now, and not beside its replays, until the clock says so."""
        for ready in [one for one in self.ready.values() if one.steady is not None and one.steady.captured is not None]:
            self._tune(ready, until)

    def forget(self) -> None:
        """Drop every plan and every graph, and the memory kept for them. What the background has not begun is not made."""
        for ready in self.ready.values():
            if ready.coming is not None:
                ready.coming.cancel()
        self.ready.clear()
        self.pairs.forget()
        if self.coming is not None:
            self.coming.forget()
        if self.steady is not None:
            self.steady.forget()
        self.relieve(hard=False)

    def _prepare(self, graph: Graph) -> Ready:
        if self.in_background():
            ready = unfused(graph, config.verify)
            ready.waits = self.options.fuses or (self.steady is not None and self.options.captures and ready.has_numbers)
            return ready
        if self.options.fuses:
            try:
                if self.executor is not None:
                    return self._worthwhile(graph, by_plan(show_plan(graph, self.planner()), self.executor, self.device))
                if shows().wanted:
                    show_plan(graph, self.planner(SHOWN_ARCH))
            except Exception as error:
                if config.verify:
                    raise
                self.sentences.append(runs_by_ops(graph, error))
        return unfused(graph, config.verify)

    def planner(self, arch: str | None = None) -> Planner:
        """What plans the regions that run here."""
        planner = planner_for(arch or self.arch, self.options.rules, self.options.grade, self.options.n_streams)
        return planner if self.tuner is None or config.tuning == "off" else replace(planner, tiles=self.tuner.tiles())

    def in_background(self) -> bool:
        return isinstance(self.backend, Backend) and self.backend.warm is not None and workers() is not None

    def _worthwhile(self, graph: Graph, made: Ready) -> Ready:
        """The plan without the kernels that are measured to gain too little, where a context asks for that."""
        planner = self.planner()
        assert self.executor is not None
        is_enough = made.plan is None or gains_enough(made.plan.plan, planner, self.executor)
        return made if is_enough else by_plan(show_plan(graph, planner), self.executor, self.device)

    def begins(self, first: Sequence[Op]) -> None:
        """The program's operators begin with these."""
        if self.coming is not None and self.options.fuses and self.in_background():
            self.coming.begins(first, self.planner())

    def ask(self, graph: Graph, now: Ready, hopes: bool = False) -> None:
        """Have a region's plan made in the background, and the kernels for it. Nobody waits for it. With `hopes`, only if it was
        made ahead, and is of one part."""
        if (self.pairs.known if hopes else self.pairs.takes(graph)) or not now.is_wanting(hopes):
            return
        coming, fuse = self.coming, self.options.fuses
        assert coming is not None
        planner = self.planner() if fuse else slot_planner_for(self.arch, self.options.n_streams)
        now.is_asked(later(lambda: coming.made(graph, now, planner, fuse, hopes)), hopes)

    def _arrived(self, graph: Graph, ready: Ready, coming: Future[Any]) -> Ready:
        """A region's plan and kernels are there, or will not be. An interrupt leaves it to be done again."""
        new = ready
        if ready.plan is not None and (coming.exception() or any(one.exception() for one in coming.result().compiling)):
            ready.coming = None  # it has a plan, with other tiles
            return ready
        try:
            made = coming.result()
            if failed := [error for future in made.compiling if isinstance(error := future.exception(), WorkerFailed)]:
                raise failed[0]
            new, made.compiling = self._worthwhile(graph, made), []
        except WorkerFailed as error:
            ready.coming, ready.waits = None, False
            self.sentences.append(stays_unfused(ready, error))
        except Exception as error:
            ready.coming, ready.waits = None, False
            if config.verify:
                raise
            self.sentences.append(runs_by_ops(ready.graph, error))
        if ready.steady is not None and self.steady is not None:
            new.steady = self.steady_of(new, ready.steady)
        if config.debug and new.plan is not None:
            shows().fused(new.n_ops, new.plan.n_kernels)
        return new

    def _tune(self, ready: Ready, until: float | None = None) -> None:
        """After a replay: go on with trying other tiles, or try them all by `until`, and have those made that are better."""
        if self.tuner is None or self.coming is None or config.tuning != "on" or not self.in_background():
            return
        try_tiles(ready, self.tuner, self.coming.executor, self.coming.warm, until)

    def _replayed(self, ready: Ready, values: list[Any], scalars: list[float]) -> Captured | None:
        """The CUDA graph as which the region was run, if it was."""
        if self.steady is None or not self.options.captures:
            return None
        ready.steady = ready.steady or self.steady_of(ready)
        n_captured, captured = self.tally.n_captured, self.steady.run(ready.steady, values, scalars)
        if config.debug and self.tally.n_captured > n_captured and captured is not None:
            shows().captured(ready.n_ops, captured.nbytes)
        return captured

    def steady_of(self, ready: Ready, before: Steady | None = None, first: Steady | None = None) -> Steady:
        """What is known of a region's runs; see `SteadyState.region`."""
        assert self.steady is not None
        ready.facts = ready.facts or GraphFacts(ready.graph, self.device)
        return self.steady.region(ready.facts, lambda *of: self._work(ready, *of), ready.waits, before, first)

    def _work(self, ready: Ready, table: SlotTable, moved: frozenset[int]) -> Work:
        """What is captured of a region. Only kernels can read moving numbers from memory."""
        backend, prepared, numbered = self.backend, ready.work, ready.in_graph
        if isinstance(prepared, Schedule):
            if numbered is None and self.executor is not None and not self.in_background() and ready.has_numbers:
                numbered = self.executor.prepare(slot_planner_for(self.arch, self.options.n_streams).plan(ready.graph))
            if numbered is None:
                assert ready.facts is not None
                return schedule_work(prepared, table, ready.facts, moved, ready.awaited)
            prepared = ready.in_graph = numbered
        assert isinstance(backend, Backend) and self.executor is not None
        in_graph = backend.prepare_in_graph or (lambda launch, usable, table: usable)
        return plan_work(self.executor, prepared, in_graph, table, self.arenas, moved, ready.awaited)

    def relieve(self, hard: bool) -> None:
        """Give back memory that nobody uses; `hard`: to the device, too."""
        if self.executor is not None:
            self.executor.pool.free_all()
        if hard and torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def let_go(self) -> None:
        """Memory has run out: give back all that is kept for later runs, graphs too, which are captured again."""
        self.tally.notes["Memory ran out: what was kept for later steps, graphs too, was given back, and a call repeated."] = None
        if self.steady is not None:
            self.steady.forget(has_room=False)
        self.relieve(hard=True)


# Of all threads; `wait_for_kernels` asks them.
runners: "weakref.WeakSet[Runner]" = weakref.WeakSet()
