"""The counts behind `kitsune.counters()` and `kitsune.explain()`."""

from collections import Counter
from typing import Any

from kitsune.ir import Barrier, Site


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
        # (operators, cause, line) of each distinct region, by the last node of its path
        self.regions: dict[Any, tuple[int, Barrier, Site | None]] = {}
        self.ends: Counter[Any] = Counter()

    def close(self, key: Any, cause: Barrier, site: Site | None) -> None:
        """A region ended."""
        self.regions[key] = (key.depth, cause, site)
        self.ends[key] += 1

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
            "regions": len(self.regions),
            "recognised": self.recognised,
            "flushed": dict(flushed),
            "passed_through": dict(passed),
        }
