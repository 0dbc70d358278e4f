"""The counts behind `kitsune.counters()` and `kitsune.explain()`."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from kitsune.ir import Barrier, Site

# How many regions are told apart in a report; a program that never repeats has no end of them.
MAX_REGIONS = 1000


@dataclass(slots=True)
class RegionTally:
    """A distinct region: its operators, how often it came, and what ended it the last time."""

    n_ops: int
    times_seen: int = 0
    cause: Barrier | None = None
    site: Site | None = None


class Tally:
    """Counts of one process since it started or since `reset()`; recorders add to it at each flush, not at each op."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Set every count to zero."""
        self.recorded = 0
        self.observed = 0
        self.executed = 0
        self.skipped = 0
        self.recognised = 0
        self.flushed: Counter[tuple[Barrier, Site | None]] = Counter()
        self.passed_through: Counter[tuple[Barrier, str]] = Counter()
        self.n_regions = 0
        self.regions: list[RegionTally] = []

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
            "regions": self.n_regions,
            "recognised": self.recognised,
            "flushed": dict(flushed),
            "passed_through": dict(passed),
        }
