"""Both loss curves as a PNG."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from kitsune.demo.compare import Comparison
from kitsune.demo.errors import DemoError


def require_matplotlib() -> None:
    """Say so before the training starts, not after."""
    if importlib.util.find_spec("matplotlib") is None:
        raise DemoError("--plot needs matplotlib: pip install matplotlib")


def plot(comparisons: Sequence[Comparison], path: Path) -> None:
    from matplotlib.figure import Figure  # imported here: the demo runs without matplotlib

    figure = Figure(figsize=(6 * len(comparisons), 4), layout="constrained")
    for axes, c in zip(figure.subplots(1, len(comparisons), squeeze=False)[0], comparisons, strict=True):
        steps = range(1, c.steps + 1)
        axes.plot(steps, c.eager.losses, color="0.7", linewidth=4, label="eager")
        axes.plot(steps, c.lazy.losses, color="tab:orange", linewidth=1.2, label=f"Kitsune ({c.form})")
        axes.set(title=f"{c.model}: {'identical' if c.identical() else 'DIFFERENT'}", xlabel="step", ylabel="loss")
        axes.legend()
    figure.savefig(path, dpi=120)
