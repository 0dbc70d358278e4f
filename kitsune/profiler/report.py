"""`kitsune.explain()`: the tally as lines that a user can read."""

from dataclasses import asdict, dataclass
from typing import Any

from kitsune.profiler.tally import Tally


@dataclass(frozen=True)
class RegionLine:
    """A distinct region: its length, how often it came, and what ended it the last time."""

    n_ops: int
    times_seen: int
    cause: str
    site: str


@dataclass(frozen=True)
class FlushLine:
    """A cause of flushes at one line of the program."""

    cause: str
    why: str
    site: str
    count: int


@dataclass(frozen=True)
class PassLine:
    """An op that ran as eager, and why."""

    reason: str
    why: str
    op: str
    count: int


@dataclass(frozen=True)
class Report:
    """What Kitsune did so far. `str(report)` is the text that users read, `to_dict()` the same for machines."""

    counters: dict[str, Any]
    regions: tuple[RegionLine, ...]
    flushes: tuple[FlushLine, ...]
    passed_through: tuple[PassLine, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries and lists, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        c = self.counters
        lines = [
            f"{c['recorded']} operators recorded, {c['observed']} observed, {c['executed']} run by replay, "
            f"{c['skipped']} needed by nobody",
            f"{c['regions']} regions, recognised {c['recognised']} times",
        ]
        lines += [f"  {r.times_seen:6d} x {r.n_ops:6d} operators, ended by {r.cause} at {r.site}" for r in self.regions]
        lines.append("flushes:" if self.flushes else "no flush")
        lines += [f"  {f.count:6d} x {f.cause} at {f.site}: {f.why}" for f in self.flushes]
        lines.append("ran as eager:" if self.passed_through else "no operator ran as eager")
        lines += [f"  {p.count:6d} x {p.op}: {p.reason}, {p.why}" for p in self.passed_through]
        return "\n".join(lines)


def report(tally: Tally) -> Report:
    """The report of a tally, the most frequent first."""
    regions = [RegionLine(r.n_ops, r.times_seen, r.cause.name if r.cause else "", _line(r.site)) for r in tally.regions]
    flushes = [FlushLine(cause.name, cause.value, _line(site), n) for (cause, site), n in tally.flushed.most_common()]
    passed = [PassLine(reason.name, reason.value, op, n) for (reason, op), n in tally.passed_through.most_common()]
    regions.sort(key=lambda r: (-r.times_seen, -r.n_ops))
    return Report(tally.counters(), tuple(regions), tuple(flushes), tuple(passed))


def _line(site: Any) -> str:
    return "(no Python line)" if site is None else str(site)
