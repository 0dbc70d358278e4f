"""A region that has been looked at, and how it is run from then on."""

import warnings
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from kitsune.background import later
from kitsune.config import KitsuneWarning
from kitsune.ir import Graph, Op, Plan, reads_slots, streams
from kitsune.profiler import PlanTally, Tally, plan_tally
from kitsune.runtime import GraphFacts, PlanExecutor, Prepared, Schedule, Steady, prepare, views_of_inputs
from kitsune.scheduler import awaited_first, dead_code, run_passes
from kitsune.tuning import Subject, Tuner

# Asks for the programs that a prepared plan will need.
Warm = Callable[[Prepared], list[Future[Any]]]


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
    # Outputs whose numbers the program waits for.
    awaited: tuple[int, ...] = ()
    # What a capture has to know of the graph; found out once somebody asks, where there is no plan.
    facts: GraphFacts | None = None
    steady: Steady | None = None
    # Of a region that is run op by op: kernels for what takes moving numbers, which its CUDA graph needs.
    in_graph: Prepared | None = None
    # Is another way to run it to be made in the background? What takes its place, once it is there, and what that waited for.
    waits: bool = False
    coming: "Future[Ready | None] | None" = None
    # Is only looked whether that was made ahead? `coming` ends with nothing if it was not.
    hopes: bool = False
    compiling: list[Future[Any]] = field(default_factory=list)
    n_runs: int = 0
    # Of one that is run by plan: where that is kept.
    file: Path | None = None
    # Of one that is run by plan: its kernels, once other tiles are tried for them.
    subject: Subject | None = None
    # Of what is to come: operators that make plans of their own, and are to be run once before. A step that made all would take
    # 0.4 s (ResNet-50, H200).
    to_try: list[Op] = field(default_factory=list)

    def is_wanting(self, hopes: bool) -> bool:
        """Is something that takes its place still to be asked for? If it was only hoped for, it is."""
        return self.waits and (self.coming is None or (self.hopes and not hopes))

    def is_asked(self, coming: "Future[Ready | None]", hopes: bool) -> None:
        """Something was asked for."""
        before, self.coming, self.hopes = self.coming, coming, hopes
        if before is not None:
            # What nobody has begun to look for need not be: the other one finds it as well.
            before.cancel()

    def arrived(self) -> "Future[Ready | None] | None":
        """What takes its place from now on, if anything does."""
        coming = self.coming
        if self.to_try or coming is None or not coming.done():
            return None
        if coming.cancelled() or not (coming.exception() or coming.result()):
            # Not made ahead, or an interrupt came while it was forgotten: to be asked for again.
            self.coming = coming = None
        return coming

    @property
    def has_numbers(self) -> bool:
        """Does it read moving numbers?"""
        return any(map(reads_slots, self.graph.ops))


def unfused(graph: Graph, check: bool) -> Ready:
    """A region that is run op by op."""
    alive = run_passes(graph, (awaited_first, dead_code), check)
    n_dead = len(graph.ops) - len(alive.ops)
    return Ready(prepare(alive), None, len(alive.ops), n_dead, alive, views_of_inputs(alive), awaited=graph.awaited)


def by_plan(plan: Plan, executor: PlanExecutor | None, device: torch.device) -> Ready:
    """A region that is run by a plan."""
    assert executor is not None, "plans are made where something runs them"
    n_ops, graph = sum(len(launch.ops) for launch in plan.launches), plan.graph
    work = executor.prepare(plan)
    # Here, and not when it is captured: the step that captures would take as much longer.
    facts = GraphFacts(graph, device, work.places)
    return Ready(work, plan_tally(plan), n_ops, plan.n_dead, graph, views_of_inputs(graph), plan.awaited, facts)


def try_tiles(ready: Ready, tuner: Tuner, executor: PlanExecutor, warm: Warm, until: float | None) -> None:
    """Go on with trying other tiles for a region that is replayed by a plan; once all are tried, have it made with the better."""
    tallied, work = ready.plan, ready.work
    if tallied is None or not isinstance(work, Prepared) or ready.coming is not None:
        return

    def changed() -> tuple[Ready, list[Future[Any]]]:
        tallied.plan = tuner.changed(tallied.plan)
        prepared = executor.prepare(tallied.plan)
        made = replace(ready, work=prepared, coming=None, steady=None, compiling=warm(prepared))
        return made, made.compiling

    ready.subject = ready.subject or Subject(tallied.plan)
    if tuner.turn(ready.subject, streams.current_handle(work.device), until):
        ready.coming = later(changed)


def stays_unfused(ready: Ready, error: Exception) -> str:
    """What a user is told where the compilers fail."""
    return (
        f"A region of {ready.n_ops} operators stays unfused, because its kernels could not be compiled. {error} "
        "With KITSUNE_COMPILE_WORKERS=0 kernels are compiled in the program's own process."
    )


def runs_by_ops(graph: Graph, error: Exception) -> str:
    """What a user is told where planning fails."""
    return (
        f"A region of {len(graph.ops)} operators could not be planned and is run op by op ({type(error).__name__}: {error}). "
        "This is a bug in Kitsune: please report it."
    )


def tell(sentences: list[str], tally: Tally, error: BaseException | None = None) -> None:
    """Warn of what was mended. Where warnings are errors, none takes the place of the `error` that ended the run."""
    while sentences:
        sentence = sentences.pop(0)
        tally.mended.append(sentence)
        try:
            warnings.warn(sentence, KitsuneWarning, stacklevel=2)
        except KitsuneWarning:
            if error is None:
                raise
