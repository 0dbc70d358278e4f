"""The demo's report as plain text: curves, verdict, what was recorded, flushed and passed through, memory, time."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from kitsune.demo.compare import Comparison, spread_ms
from kitsune.demo.measure import how_peak_is_measured
from kitsune.demo.train import READ_EVERY, TrainResult

BARS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 60
# A run has few distinct regions, but one that never settles would fill the screen.
MAX_ROWS = 12


def render(comparison: Comparison, device: torch.device) -> str:
    c = comparison
    sections = [
        f"== {c.model}: {c.steps} steps, form {c.form}, warmup {c.warmup}, seed {c.seed}, {where(device)} ==",
        render_losses(c),
        render_verdict(c),
        render_counters(c.lazy.counters),
        render_gate(c.lazy.counters),
        render_explanation(c.lazy.report),
        render_plan(c.lazy.plan, int(str(c.lazy.counters.get("kernels", 0))), device),
        render_memory(c, device),
        render_time(c, device),
    ]
    return "\n\n".join(section for section in sections if section)


def render_losses(c: Comparison) -> str:
    shown = sorted({1, *(round(c.steps * i / 5) or 1 for i in range(1, 6))})
    rows = [("step", *map(str, shown))]
    rows += [(name, *(f"{result.losses[s - 1]:.4f}" for s in shown)) for name, result in both(c)]
    curves = [f"  {name:8s} {sparkline(result.losses)}" for name, result in both(c)]
    return "\n".join(["loss", *table(rows), *curves])


def render_verdict(c: Comparison) -> str:
    compared = {"losses": c.steps, "gradients": len(c.eager.grads), "parameters": len(c.eager.params)}
    lines = []
    for kind, names in c.differing().items():
        if names:
            lines.append(f"  {kind}: {len(names)} of {compared[kind]} DIFFER, first {names[0]}")
        else:
            lines.append(f"  {kind}: all {compared[kind]} identical, bit for bit")
    if c.numerics == "strict":
        lines.append(f"  numerics=strict: losses are within {c.distance():.1e} of eager's, relatively")
    return "\n".join(["compared with eager", *lines])


def render_counters(counters: dict[str, Any]) -> str:
    words = (
        ("recorded", "recorded lazily"),
        ("observed", "run at once and recorded"),
        ("executed", "executed"),
        ("skipped", "recorded, but needed by nobody"),
    )
    rows = [(word, str(counters[name])) for name, word in words if name in counters]
    return "\n".join(["operators", *table(rows)])


def render_gate(counters: dict[str, Any]) -> str:
    decided = counters.get("gate_decided")
    if not decided:
        return ""
    left = f"{counters['gate_left']} steps were left to eager; KITSUNE_GATE=0 records them all"
    return "\n".join(["gate", *table([(sentence,) for sentence in (*decided, left)])])


def render_explanation(report: Any) -> str:
    if report is None:
        return ""
    regions = [(f"{r.n_ops} ops", f"seen {times(r.times_seen)}", f"ended by {r.cause}", short(r.site)) for r in report.regions]
    flushes = [(f.cause, short(f.site), times(f.count), f.why) for f in report.flushes]
    passed = [(p.reason, str(p.op), times(p.count), p.why) for p in report.passed_through]
    return "\n\n".join(
        [
            "\n".join([f"regions: {len(regions)} distinct", *table(first(regions))]),
            "\n".join(["flushes, by cause and line", *table(first(flushes))]),
            "\n".join(["passed through to eager, by reason", *(table(first(passed)) or ["  none"])]),
        ]
    )


def render_plan(plan: Any, used: int, device: torch.device) -> str:
    if plan is None:
        return ""
    head = (
        f"plan of a step: {used} kernels of its kind ran" if used else f"plan that a GPU would get for a step: {device} has none"
    )
    before, after = plan.nbytes_unplanned / 2**20, plan.nbytes / 2**20
    rows = [
        ("", "one by one", "planned"),
        ("launches", str(plan.n_unplanned), str(plan.n_launches)),
        ("bytes to move", f"{before:.1f} MiB", f"{after:.1f} MiB ({before - after:.1f} saved)"),
    ]
    kernels = [
        (launch.name, f"{len(launch.ops)} ops", f"{launch.micros:.1f} us modelled") for launch in plan.launches if launch.kernels
    ]
    refused = [(times(n), reason) for reason, n in plan.refusal_counts().most_common()]
    return "\n".join(
        [
            head,
            *table(rows),
            "kernels",
            *table(first(kernels)),
            "kept apart, by reason",
            *(table(first(refused)) or ["  nothing"]),
        ]
    )


def render_memory(c: Comparison, device: torch.device) -> str:
    if c.eager.peak_bytes is None or c.lazy.peak_bytes is None:
        return "peak memory: not measured, this system offers no peak that can be reset"
    rows = [(name, f"{(result.peak_bytes or 0) / 2**20:.1f} MiB") for name, result in both(c)]
    return "\n".join([f"peak memory: {how_peak_is_measured(device)}", *table(rows)])


def render_time(c: Comparison, device: torch.device) -> str:
    rows = [("", "median", "quartiles")]
    for name, result in both(c):
        t = spread_ms(result)
        rows.append((name, f"{t['median']:.2f} ms", f"{t['q1']:.2f} to {t['q3']:.2f} ms"))
    left = bool(c.lazy.counters.get("gate_left"))
    words = textwrap.fill(expectation(c.ratio(), device, left), 100, initial_indent="  ", subsequent_indent="  ")
    return "\n".join([f"time per step, taken every {READ_EVERY} steps", *table(rows), words])


def expectation(ratio: float, device: torch.device, left: bool = False) -> str:
    measured = f"Here a step under Kitsune took {ratio:.2f} times the eager one."
    if left:
        return f"{measured} Most of them were eager's own: the gate left them to eager, once it had decided."
    if device.type == "cuda":
        return (
            f"{measured} Its kernels move fewer bytes in fewer launches, but each step is still recorded and launched by Python: "
            "expect a slower step where Python is what limits it."
        )
    return f"{measured} There are no kernels for a CPU: regions run op by op there, so expect it to be slower than eager."


def where(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} threads)"


def both(c: Comparison) -> tuple[tuple[str, TrainResult], tuple[str, TrainResult]]:
    return ("eager", c.eager), ("kitsune", c.lazy)


def first(rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    rest = len(rows) - MAX_ROWS
    return [*rows[:MAX_ROWS], (f"... and {rest} more",)] if rest > 0 else list(rows)


def table(rows: Iterable[Sequence[str]]) -> list[str]:
    rows = list(rows)
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows), default=0))]
    padded = ([cell.ljust(width) for cell, width in zip(row, widths, strict=False)] for row in rows)
    return ["  " + "  ".join(cells).rstrip() for cells in padded]


def short(site: str) -> str:
    """The file's name with its folder: enough to find a line of one's own program."""
    return "/".join(site.rsplit("/", 2)[-2:])


def times(n: int) -> str:
    return "once" if n == 1 else f"{n} times"


def sparkline(values: Sequence[float]) -> str:
    n = min(SPARK_WIDTH, len(values))
    sampled = [values[i * len(values) // n] for i in range(n)]
    finite = [v for v in sampled if v == v and abs(v) != float("inf")]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((v - low) * scale)] if v in finite else "?" for v in sampled)
