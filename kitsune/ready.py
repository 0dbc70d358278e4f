"""A region that has been looked at, and how it is run from then on."""

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from kitsune.ir import Graph
from kitsune.profiler import PlanTally
from kitsune.runtime import Prepared, Schedule, Steady


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
    # The same, if its plan lies on disk, which is looked up before it is known whether the region comes back.
    kept: "Future[Ready | None] | None" = None

    def arrived(self) -> "Future[Ready] | None":
        """What takes its place from now on, if anything does."""
        if self.kept is not None and self.kept.done():
            kept, self.kept = self.kept, None
            # A failure would be met again, and told, where the plan is made.
            if kept.exception() is None and kept.result() is not None:
                return kept  # type: ignore[return-value]
        return self.coming if self.coming is not None and self.coming.done() else None


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
