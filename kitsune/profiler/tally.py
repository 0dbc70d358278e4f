"""The counts behind `kitsune.counters()` and `kitsune.explain()`."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from kitsune.ir import Barrier, Plan, Site, Tile

# How many regions are told apart in a report; a program that never repeats has no end of them.
MAX_REGIONS = 1000


@dataclass(slots=True)
class RegionTally:
    """A distinct region: its operators, how often it came, and what ended it the last time."""

    n_ops: int
    times_seen: int = 0
    cause: Barrier | None = None
    site: Site | None = None


class Tried(Protocol):
    """A kernel of which several tiles were timed; `gain` are the microseconds that another than the first choice saves."""

    @property
    def gain(self) -> float: ...

    @property
    def micros(self) -> Mapping[Tile, float]: ...

    @property
    def tile(self) -> Tile: ...

    @property
    def known(self) -> bool: ...


@dataclass(slots=True)
class PlanTally:
    """A plan that was run: its fused kernels, the ops in them, and how often."""

    plan: Plan
    n_launches: int
    n_kernels: int
    n_fused: int
    times_run: int = 0


def plan_tally(plan: Plan) -> PlanTally:
    """The tally of a plan that has not run yet."""
    fused = [launch for launch in plan.launches if launch.kernels]
    return PlanTally(plan, plan.n_launches, len(fused), sum(len(launch.ops) for launch in fused))


class Tally:
    """Counts of one process since it started or since `reset()`; recorders add to it at each flush, not at each op."""

    def __init__(self) -> None:
        # How many programs are being compiled now; whoever has them compiled says so.
        self.n_compiling: Callable[[], int] = lambda: 0
        self.reset()

    def reset(self) -> None:
        """Set every count to zero."""
        self.recorded = 0
        self.observed = 0
        self.executed = 0
        self.skipped = 0
        # Of the regions run by plan: their ops, what reached the device instead, and how much of that were kernels of ours.
        self.planned = 0
        self.launched = 0
        self.kernels = 0
        self.fused = 0
        # Runs op by op because a plan or its kernels were not there yet.
        self.unfused = 0
        # Runs that were compared with eager, and those in which something was found.
        self.checked = 0
        self.different = 0
        self.plans: list[PlanTally] = []
        # Failures that were worked around, as sentences.
        self.mended: list[str] = []
        # What was chosen for kernels of which other tiles were tried, by name and domain, and how many are still to be tried.
        self.chosen: dict[tuple[str, tuple[int, ...]], Tried] = {}
        self.n_untried = 0
        # What else users are to know, as sentences, in order.
        self.notes: dict[str, None] = {}
        # CUDA graphs: regions captured, runs that were replays, results moved because they were still held, runs that a graph
        # did not fit, and regions without one, by reason.
        self.n_captured = 0
        self.n_replayed = 0
        self.n_moved = 0
        self.missed_graphs: Counter[str] = Counter()
        self.refused_graphs: Counter[str] = Counter()
        self.recognised = 0
        # Calls of torch's API, backwards and optimizers' updates that were followed; how often followed calls were made
        # again for their graph.
        self.followed = 0
        self.backwards = 0
        self.updates = 0
        self.realized = 0
        # Where the program has asked for their graph; and backwards that were not followed, why and where.
        self.asked: Counter[Site | None] = Counter()
        self.full_backwards: Counter[tuple[str, Site | None]] = Counter()
        # Numbers that were read before their region had ended, and regions that were run with the one before.
        self.answered = 0
        self.foreseen = 0
        # Steps that the gate left to eager, how often it looked again, and what it decided, as sentences.
        self.gate_left = 0
        self.gate_revisited = 0
        self.gate: Counter[str] = Counter()
        # Calls of static functions without their Python, calls that checked them, and why others were not made so.
        self.static_skipped = 0
        self.static_audits = 0
        self.static_refused: Counter[str] = Counter()
        self.flushed: Counter[tuple[Barrier, Site | None]] = Counter()
        self.passed_through: Counter[tuple[Barrier, str]] = Counter()
        self.n_regions = 0
        self.regions: list[RegionTally] = []

    def made_again(self, site: Any) -> None:
        """Followed calls were made again for their graph, which this line asked for, if it is one."""
        self.realized += 1
        if site is None or isinstance(site, Site):
            self.asked[site] += 1

    def ran(self, n_ops: int, n_dead: int, plan: PlanTally | None, unfused: bool = False) -> None:
        """A region was run, by plan or op by op; `unfused` if that is for want of kernels."""
        self.executed += n_ops
        self.unfused += unfused
        self.skipped += n_dead
        if plan is None:
            return
        self.planned += n_ops
        self.launched += plan.n_launches
        self.kernels += plan.n_kernels
        self.fused += plan.n_fused
        if not plan.times_run and len(self.plans) < MAX_REGIONS:
            self.plans.append(plan)
        plan.times_run += 1

    def captured(self, n_ops: int, nbytes: int) -> None:
        """A region was captured as a CUDA graph."""
        self.n_captured += 1

    def replayed(self) -> None:
        """A CUDA graph was replayed."""
        self.n_replayed += 1

    def moved(self, n: int) -> None:
        """Results of an earlier replay were moved, because they are still held."""
        self.n_moved += n

    def missed(self, reason: str) -> None:
        """A CUDA graph did not fit this time."""
        self.missed_graphs[reason] += 1

    def refused(self, reason: str) -> None:
        """A region is not captured, or not any more."""
        self.refused_graphs[reason] += 1

    def decided(self, sentence: str) -> None:
        """The gate has decided that steps are left to eager, or recorded."""
        if sentence in self.gate or len(self.gate) < MAX_REGIONS:
            self.gate[sentence] += 1

    def not_static(self, sentence: str) -> None:
        """A call of a static function could not be learned from."""
        if sentence in self.static_refused or len(self.static_refused) < MAX_REGIONS:
            self.static_refused[sentence] += 1

    def close(self, known: RegionTally | None, n_ops: int, cause: Barrier, site: Site | None) -> RegionTally:
        """A region ended. `known` is what this returned when the region ended before, None for a new one."""
        if known is None:
            known = RegionTally(n_ops)
            self.n_regions += 1
            if len(self.regions) < MAX_REGIONS:
                self.regions.append(known)
        else:
            self.recognised += 1
        known.times_seen += 1
        known.cause, known.site = cause, site
        return known

    def counters(self) -> dict[str, Any]:
        """The counts as a plain dictionary; causes and reasons by name."""
        flushed: Counter[str] = Counter()
        for (cause, _), n in self.flushed.items():
            flushed[cause.name] += n
        passed: Counter[str] = Counter()
        for (reason, _), n in self.passed_through.items():
            passed[reason.name] += n
        return {
            "recorded": self.recorded,
            "observed": self.observed,
            "executed": self.executed,
            "skipped": self.skipped,
            "planned": self.planned,
            "launched": self.launched,
            "kernels": self.kernels,
            "fused": self.fused,
            "compiling": self.n_compiling(),
            "unfused": self.unfused,
            "checked": self.checked,
            "different": self.different,
            "tiles_tried": len(self.chosen),
            "tiles_changed": sum(choice.gain > 0 for choice in self.chosen.values()),
            "tiles_untried": self.n_untried,
            "regions": self.n_regions,
            "recognised": self.recognised,
            "followed": self.followed,
            "backwards_followed": self.backwards,
            "updates_followed": self.updates,
            "realized": self.realized,
            "answered": self.answered,
            "foreseen": self.foreseen,
            "captured": self.n_captured,
            "replayed": self.n_replayed,
            "moved": self.n_moved,
            "graph_missed": dict(self.missed_graphs),
            "graph_refused": dict(self.refused_graphs),
            "gate_left": self.gate_left,
            "gate_revisited": self.gate_revisited,
            "gate_decided": dict(self.gate),
            "static_skipped": self.static_skipped,
            "static_audits": self.static_audits,
            "static_refused": dict(self.static_refused),
            "flushed": dict(flushed),
            "passed_through": dict(passed),
        }
