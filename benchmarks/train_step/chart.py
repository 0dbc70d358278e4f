"""The rows as a picture: how many times as fast as eager each column is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.models import MODELS
from benchmarks.train_step.columns import COLUMNS
from benchmarks.train_step.rows import load
from benchmarks.train_step.table import speed

# Peers in greys and blues, Kitsune in orange: the question is where the orange ends.
COLOURS = {
    "eager": "#999999",
    "graph": "#c6dbef",
    "graph-cl": "#9ecae1",
    "compile": "#6baed6",
    "reduce-overhead": "#3182bd",
    "compile-graph": "#08519c",
    "kitsune": "#fd8d3c",
    "kitsune-fast": "#fdae6b",
    "kitsune-static": "#d94801",
}


def draw(source: Path, target: Path) -> str:
    """Draw a file of results; says what came of it. Without matplotlib there is no picture, and that is said instead."""
    try:
        import matplotlib
    except ImportError:
        return "No chart: matplotlib is not installed (pip install matplotlib)."
    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = load(source)
    panels = sorted({(row["size"], row["precision"], row["read"]) for row in found["rows"]})
    figure, axes = pyplot.subplots(len(panels), 1, figsize=(13, 4.2 * len(panels)), squeeze=False, layout="constrained")
    for panel, axis in zip(panels, axes[:, 0], strict=True):
        _draw_panel(axis, panel, [row for row in found["rows"] if (row["size"], row["precision"], row["read"]) == panel])
    where = found["environment"]
    figure.suptitle(f"Training step, times as fast as eager: {where['device']}, torch {where['torch']}")
    figure.savefig(target, dpi=120)
    pyplot.close(figure)
    return f"chart in {target}"


def _draw_panel(axis: Any, panel: tuple[str, str, str], rows: list[dict[str, Any]]) -> None:
    models = [model for model in MODELS if any(row["model"] == model for row in rows)]
    columns = [column for column in COLUMNS if any(row["column"] == column for row in rows)]
    width = 0.85 / len(columns)
    for i, column in enumerate(columns):
        of_model = {row["model"]: row for row in rows if row["column"] == column}
        places = [n + (i - (len(columns) - 1) / 2) * width for n in range(len(models))]
        speeds = [speed(rows, of_model[model], "eager") if model in of_model else None for model in models]
        # From 1 upwards or downwards: slower than eager is a bar that hangs.
        heights = [value - 1 if value else 0.0 for value in speeds]
        axis.bar(places, heights, width, bottom=1.0, color=COLOURS[column], label=column)
        for place, value, model in zip(places, speeds, models, strict=True):
            # Nothing is written where nothing was measured yet.
            text = f"{value:.2f}" if value else "no" if model in of_model else ""
            axis.annotate(
                text, (place, max(value or 1.0, 1.0)), (0, 3), textcoords="offset points", ha="center", fontsize=6, rotation=90
            )
    axis.set_yscale("log")
    for numbers in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        numbers(lambda value, _: f"{value:g}")
    axis.tick_params(axis="y", which="both", labelsize=7)
    # Room above the bars for their figures, also where no bar goes up.
    low, high = axis.get_ylim()
    axis.set_ylim(low, max(high, 1.05) * 1.5)
    axis.axhline(1.0, color="black", linewidth=0.8)
    axis.set_xticks(range(len(models)), models)
    size, precision, read = panel
    axis.set_title(f"{precision}, {size} size, loss read {read}", fontsize=9)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
