"""What `KitsuneOptimizer.print_summary()` prints and `save_profile()` writes."""

from __future__ import annotations

import json
import os
from typing import Any

from kitsune.profiler.tally import Tally


def fusion_of(tally: Tally) -> dict[str, Any]:
    """Counts over the runs of plans, and what their launches move less than their operators would."""
    runs = [(one.plan, one.n_kernels, one.n_fused, one.times_run) for one in tally.plans if one.times_run]
    fusible = sum(times * sum(1 for op in plan.graph.ops if op.kind.name != "VIEW") for plan, _, _, times in runs)
    fused = sum(times * n_fused for _, _, n_fused, times in runs)
    n_runs = sum(times for *_, times in runs)
    return {
        "kernels_per_run": sum(times * n for _, n, _, times in runs) / n_runs if n_runs else None,
        "fused_ops_per_run": fused / n_runs if n_runs else None,
        "efficiency": fused / fusible if fusible else None,
        "bytes_saved_per_run": sum(t * (p.nbytes_unplanned - p.nbytes) for p, *_, t in runs) / n_runs if n_runs else None,
    }


def graph_of(tally: Tally) -> dict[str, Any]:
    """CUDA graphs."""
    return {
        "captured": tally.n_captured,
        "replayed": tally.n_replayed,
        "missed": sum(tally.missed_graphs.values()),
        "refused": dict(tally.refused_graphs),
    }


def write_metrics(metrics: dict[str, Any], filepath: str | os.PathLike[str]) -> None:
    """Write metrics as JSON. Raises OSError, with what to do, where that is not possible."""
    if not isinstance(filepath, (str, os.PathLike)) or not os.fspath(filepath):
        raise TypeError(f"filepath={filepath!r} is not possible: save_profile takes the path of a file, such as 'profile.json'.")
    try:
        with open(filepath, "w", encoding="utf-8") as file:
            json.dump(metrics, file, indent=2)
            file.write("\n")
    except OSError as error:
        raise type(error)(
            error.errno,
            f"the profile cannot be written ({error.strerror}): give save_profile() a file in a folder that can be written",
            os.fspath(filepath),
        ) from None


# Heading, and (words, path in the metrics, unit): "x" for ratios, "%" for shares, "MiB" for bytes.
SECTIONS: tuple[tuple[str, tuple[tuple[str, str, str], ...]], ...] = (
    (
        "Performance",
        (
            ("steps", "steps", ""),
            ("step time", "speed.step_ms", "ms"),
            ("step time of the baseline", "speed.baseline_ms", "ms"),
            ("baseline", "speed.baseline", ""),
            ("speedup", "speed.speedup", "x"),
            ("steps per second", "throughput.iterations_per_sec", ""),
            ("samples per second", "throughput.samples_per_sec", ""),
        ),
    ),
    (
        "Stream parallelism",
        (
            ("streams allowed", "streams.allowed", ""),
            ("streams used", "streams.used", ""),
            ("stream efficiency", "streams.efficiency", "%"),
        ),
    ),
    (
        "Kernel fusion",
        (
            ("fused kernels in a run", "fusion.kernels_per_run", ""),
            ("operators in them", "fusion.fused_ops_per_run", ""),
            ("fusion efficiency", "fusion.efficiency", "%"),
            ("less to move in a run", "fusion.bytes_saved_per_run", "MiB"),
        ),
    ),
    (
        "CUDA graphs",
        (("captured", "graph.captured", ""), ("replayed", "graph.replayed", ""), ("not fitting", "graph.missed", "")),
    ),
    (
        "Memory",
        (
            ("peak allocated", "memory.peak_allocated", "MiB"),
            ("peak reserved", "memory.peak_reserved", "MiB"),
            ("pool hits", "memory.pool_hit_rate", "%"),
        ),
    ),
    (
        "Mixed precision",
        (
            ("precision", "amp.dtype", ""),
            ("gradient scale", "amp.scale", ""),
            ("steps skipped after an overflow", "amp.skipped", ""),
        ),
    ),
)


def summary_text(metrics: dict[str, Any]) -> str:
    """The metrics as lines, with n/a for what was not measured."""
    lines = ["Kitsune summary"]
    for heading, rows in SECTIONS:
        lines.append(f"{heading}:")
        lines += [f"  {words:32s} {_shown(_at(metrics, path), unit)}" for words, path, unit in rows]
    return "\n".join(lines)


def _at(metrics: dict[str, Any], path: str) -> Any:
    found: Any = metrics
    for part in path.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def _shown(value: Any, unit: str) -> str:
    if value is None:
        return "n/a"
    if unit == "%":
        return f"{value:.1%}"
    if unit == "MiB":
        return f"{value / 2**20:.1f} MiB"
    if unit == "x":
        return f"{value:.2f}x"
    number = f"{value:.3f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
    return f"{number} {unit}".rstrip()
