"""`kitsune.explain()`: the tally as lines that a user can read."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from kitsune.profiler.tally import PlanTally, Tally

# Reasons that `str(report)` shows for a plan; `to_dict()` has them all.
MAX_REASONS = 8
# Kernels whose tiles it shows, those that gained the most.
MAX_TILES = 12


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
class BackwardLine:
    """Backwards that the autograd engine has run: why they were not followed, and from where."""

    why: str
    site: str
    count: int


@dataclass(frozen=True)
class PlanLine:
    """A region that was run by plan: launches and bytes before and after planning, and what kept ops apart, by reason."""

    n_ops: int
    times_run: int
    launches_before: int
    launches: int
    kernels: int
    fused_ops: int
    bytes_before: int
    bytes: int
    arena_bytes: int
    modelled_us: float
    refusals: dict[str, int]


@dataclass(frozen=True)
class TileLine:
    """A kernel of which several tiles were timed: microseconds of each, the first choice first, and the one that it has.

    `remembered`: they were timed by an earlier process.
    """

    kernel: str
    domain: tuple[int, ...]
    tile: str
    micros: dict[str, float]
    remembered: bool


@dataclass(frozen=True)
class NumericsLine:
    """An op whose bits may differ from eager's: why, by how much, and how often the last plan has it so."""

    op: str
    reason: str
    measured: str | None
    in_last_plan: int


@dataclass(frozen=True)
class Numerics:
    """The grade of numerics in force, and what it allows to differ from eager's bits, the most frequent first."""

    grade: str
    lines: tuple[NumericsLine, ...]

    def __str__(self) -> str:
        """A sentence for each op; those of one reason together."""
        found = [f"numerics={self.grade!r}: the bits of these may differ from eager's, and of nothing else"]
        for reason in dict.fromkeys(line.reason for line in self.lines):
            found.append(f"  {reason}:")
            for line in self.lines:
                if line.reason == reason:
                    often = f", {line.in_last_plan} x in the last plan" if line.in_last_plan else ""
                    found.append(f"    {line.op}{': ' if line.measured else ''}{line.measured or ''}{often}")
        return "\n".join(found)


@dataclass(frozen=True)
class Report:
    """What Kitsune did so far. `str(report)` is the text that users read, `to_dict()` the same for machines."""

    counters: dict[str, Any]
    regions: tuple[RegionLine, ...]
    flushes: tuple[FlushLine, ...]
    passed_through: tuple[PassLine, ...]
    backwards: tuple[BackwardLine, ...] = ()
    # Lines that asked for the graph of calls, which were made again for it; and how often.
    graph_asked: dict[str, int] = field(default_factory=dict)
    plans: tuple[PlanLine, ...] = ()
    tiles: tuple[TileLine, ...] = ()
    # Failures that were worked around.
    mended: tuple[str, ...] = ()
    # What else there is to know.
    notes: tuple[str, ...] = ()
    # If that was asked for.
    numerics: Numerics | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries and lists, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        c = self.counters
        lines = [
            f"{c['recorded']} operators recorded, {c['observed']} observed, {c['executed']} executed, "
            f"{c['skipped']} needed by nobody",
            f"{c['regions']} regions, recognised {c['recognised']} times",
        ]
        lines += [f"  {r.times_seen:6d} x {r.n_ops:6d} operators, ended by {r.cause} at {r.site}" for r in self.regions]
        lines += _plan_lines(self.plans)
        if c["unfused"] or c["compiling"]:
            lines.append(f"{c['unfused']} runs unfused while kernels were compiled, {c['compiling']} kernels still in work")
        lines += _tile_lines(c, self.tiles)
        lines += _graph_lines(c)
        lines += [f"mended: {sentence}" for sentence in self.mended]
        lines += [f"note: {sentence}" for sentence in self.notes]
        lines += _gate_lines(c)
        lines += _static_lines(c)
        lines.append("flushes:" if self.flushes else "no flush")
        lines += [f"  {f.count:6d} x {f.cause} at {f.site}: {f.why}" for f in self.flushes]
        lines += _graph_asked_lines(self.backwards, self.graph_asked)
        lines.append("ran as eager:" if self.passed_through else "no operator ran as eager")
        lines += [f"  {p.count:6d} x {p.op}: {p.reason}, {p.why}" for p in self.passed_through]
        lines += [str(self.numerics)] if self.numerics else []
        return "\n".join(lines)


def report(tally: Tally, numerics: Numerics | None = None) -> Report:
    """The report of a tally, the most frequent first."""
    regions = [RegionLine(r.n_ops, r.times_seen, r.cause.name if r.cause else "", _line(r.site)) for r in tally.regions]
    flushes = [FlushLine(cause.name, cause.value, _line(site), n) for (cause, site), n in tally.flushed.most_common()]
    passed = [PassLine(reason.name, reason.value, op, n) for (reason, op), n in tally.passed_through.most_common()]
    backwards = [BackwardLine(why, _line(site), n) for (why, site), n in tally.full_backwards.most_common()]
    regions.sort(key=lambda r: (-r.times_seen, -r.n_ops))
    plans = [plan_line(p) for p in sorted(tally.plans, key=lambda p: -p.times_run)]
    chosen = sorted(tally.chosen.items(), key=lambda item: (-item[1].gain, item[0]))
    tiles = [
        TileLine(*kernel, str(c.tile), {str(tile): round(us, 1) for tile, us in c.micros.items()}, c.known)
        for kernel, c in chosen
    ]
    return Report(
        counters=tally.counters(),
        regions=tuple(regions),
        flushes=tuple(flushes),
        passed_through=tuple(passed),
        backwards=tuple(backwards),
        graph_asked={_line(site): n for site, n in tally.asked.most_common()},
        plans=tuple(plans),
        tiles=tuple(tiles),
        mended=tuple(tally.mended),
        notes=tuple(tally.notes),
        numerics=numerics,
    )


def plan_line(run: PlanTally) -> PlanLine:
    """What planning did to one region."""
    plan = run.plan
    return PlanLine(
        n_ops=plan.n_recorded,
        times_run=run.times_run,
        launches_before=plan.n_unplanned,
        launches=plan.n_launches,
        kernels=run.n_kernels,
        fused_ops=run.n_fused,
        bytes_before=plan.nbytes_unplanned,
        bytes=plan.nbytes,
        arena_bytes=plan.arena,
        modelled_us=sum(launch.micros for launch in plan.launches),
        refusals=dict(plan.refusal_counts().most_common()),
    )


def _plan_lines(plans: Sequence[PlanLine]) -> list[str]:
    if not plans:
        return ["no region was planned: each ran op by op"]
    lines = ["planned:"]
    for p in plans:
        saved = (p.bytes_before - p.bytes) / 2**20
        lines.append(
            f"  {p.times_run:6d} x {p.n_ops:6d} operators: {p.launches_before} launches -> {p.launches}, {p.kernels} of them "
            f"kernels for {p.fused_ops} operators; {saved:.1f} MiB less to move, arena {p.arena_bytes / 2**20:.1f} MiB, "
            f"{p.modelled_us:.1f} us modelled"
        )
        lines += [f"           {n:6d} x not fused: {reason}" for reason, n in list(p.refusals.items())[:MAX_REASONS]]
    return lines


def _graph_asked_lines(backwards: Sequence[BackwardLine], asked: dict[str, int]) -> list[str]:
    lines = ["backwards that autograd ran:"] if backwards else []
    lines += [f"  {b.count:6d} x at {b.site}: {b.why}" for b in backwards]
    lines += ["calls made again, since their graph was asked for:"] if asked else []
    return lines + [f"  {n:6d} x at {line}" for line, n in asked.items()]


def _tile_lines(c: dict[str, Any], tiles: Sequence[TileLine]) -> list[str]:
    lines = []
    if tiles or c["tiles_untried"]:
        lines.append(
            f"tiles: of {c['tiles_tried']} kernels several were timed, {c['tiles_changed']} have another than the first choice, "
            f"{c['tiles_untried']} are still to be timed"
        )
    for line in tiles[:MAX_TILES]:
        size = " x ".join(map(str, line.domain))
        tried = ", ".join(f"{tile} {us} us" for tile, us in line.micros.items())
        lines.append(f"  {line.kernel} of {size}: {line.tile}{', remembered' if line.remembered else ''}; timed were {tried}")
    return lines


def _graph_lines(c: dict[str, Any]) -> list[str]:
    lines = []
    if c["captured"]:
        lines.append(
            f"{c['captured']} CUDA graphs captured, replayed {c['replayed']} times; {c['moved']} results moved, being still held"
        )
    lines += [f"  {n:6d} x no replay: {reason}" for reason, n in c["graph_missed"].items()]
    return lines + [f"  {n:6d} x no CUDA graph: {reason}" for reason, n in c["graph_refused"].items()]


def _gate_lines(c: dict[str, Any]) -> list[str]:
    lines = [f"gate: {sentence} ({n} times)" if n > 1 else f"gate: {sentence}" for sentence, n in c["gate_decided"].items()]
    if c["gate_left"]:
        lines.append(f"gate: {c['gate_left']} steps left to eager so far; KITSUNE_GATE=0 records them all")
    return lines


def _static_lines(c: dict[str, Any]) -> list[str]:
    lines = []
    if c["static_skipped"] or c["static_audits"]:
        lines.append(f"static: {c['static_skipped']} calls without their Python, {c['static_audits']} audits")
    return lines + [f"  {n:6d} x not static: {sentence}" for sentence, n in c["static_refused"].items()]


def _line(site: Any) -> str:
    return "(no Python line)" if site is None else str(site)
