"""One training step of seven models: Kitsune beside eager, CUDA graphs made by hand, and torch.compile.

    python -m benchmarks.train_step --models mlp,lenet --columns eager,compile-graph,kitsune --precision amp,fp32 --json FILE
    python -m benchmarks.train_step --table FILE        # what a file says
    python -m benchmarks.train_step --chart FILE        # drawn, beside it

Every column of every model has processes of its own, one with empty caches on disk and one with those that the first left.
Rows join those that FILE has already, so the whole table can be made in pieces. Columns:

    eager            the loop as it is
    graph, graph-cl  eager in one hand-made CUDA graph of the whole step; in channels-last
    compile          torch.compile of model and loss; reduce-overhead: in that mode
    compile-graph    torch.compile of model and loss, in one hand-made CUDA graph of the whole step: the anchor
    kitsune          the loop as it is, in `with kitsune.accelerate():`
    kitsune-fast     the same in numerics="fast"
    kitsune-static   the step in `kitsune.accelerate(static=True)`

Four resident batches take turns; graphs copy theirs in. Peak memory, launches and device time need CUDA.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.environment import RESULTS, environment
from benchmarks.models import MODELS
from benchmarks.train_step import chart, rows, table
from benchmarks.train_step.columns import COLUMNS
from benchmarks.train_step.worker import Task


def main() -> None:
    """Measure and print, or print or draw what was measured."""
    options = parse()
    if options.table:
        print(table.show(rows.load(Path(options.table))["rows"]))
    elif options.chart:
        source = Path(options.chart)
        print(chart.draw(source, Path(options.out) if options.out else source.with_suffix(".png")))
    else:
        measure_all(options)


def measure_all(options: argparse.Namespace) -> None:
    """Measure every column that was asked for, keeping the file complete after each."""
    device = torch.device(options.device)
    target = Path(options.json) if options.json else RESULTS / f"train-step-{device.type}.json"
    kept, commit, measured = rows.load_for_merging(target, device), options.commit or environment(device)["commit"], []
    for task in tasks(options):
        row = {**rows.measure(task, options.timeout, not options.no_warm), "commit": commit}
        measured.append(row)
        kept = rows.merge(kept, [row])
        rows.keep(target, kept, device)
        print(_told(row), flush=True)
    # With what earlier runs measured of the same models, to compare with.
    shown = [row for row in kept if any(rows.find([row], new, row["column"]) for new in measured)]
    print("", table.show(shown), f"kept in {target}", sep="\n")
    if any(row.get("note", "").startswith("failed") for row in measured):
        sys.exit("Some columns failed; the notes above say how.")


def tasks(options: argparse.Namespace) -> list[Task]:
    """Every combination of what was asked for, eager of each model before what is compared with it."""
    n_first, samples, seconds = options.first, options.samples, options.seconds
    product = itertools.product(options.read, options.precision, options.models, options.columns)
    return [
        Task(model, column, precision, options.size, read, options.device, "cold", n_first, samples, seconds)
        for read, precision, model, column in product
    ]


def _told(row: rows.Row) -> str:
    head = f"{row['model']}, {row['column']}, {row['precision']}, read {row['read']}: "
    parts = [f"{row['step_ms']:.3f} ms"] if "step_ms" in row else []
    parts += [row["note"]] if "note" in row else []
    parts += [f"took {row['cold_process_s'] + row.get('warm_process_s', 0):.0f} s"]
    return head + ", ".join(parts)


def _choice(known: tuple[str, ...]) -> Callable[[str], list[str]]:
    def some(text: str) -> list[str]:
        chosen = list(known) if text == "all" else [name.strip() for name in text.split(",")]
        for name in chosen:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return chosen

    return some


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", type=_choice(MODELS), default="all", help="'all', or some of " + ",".join(MODELS))
    add("--columns", type=_choice(tuple(COLUMNS)), default="all", help="'all', or some of those above")
    add("--precision", type=_choice(("amp", "fp32", "tf32")), default="amp", help="some of amp (bf16, fused AdamW), fp32, tf32")
    add("--read", type=_choice(("every 20", "each")), default="every 20", help="'each' looks at the loss before each backward")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--size", choices=("small", "full"), default="full")
    add("--no-warm", action="store_true", help="leave out the second process: warm caches and memory")
    add("--first", type=int, default=30, help="steps whose times and losses are kept one by one (%(default)s)")
    add("--samples", type=int, default=30, help="at most so many samples of 20 steps (%(default)s)")
    add("--seconds", type=float, default=3.0, help="no sample starts after so long, if there are five (%(default)s)")
    add("--timeout", type=float, default=300.0, help="seconds that a process may take (%(default)s)")
    add("--commit", help="what to note as measured, where the tree is a copy without its history (default: git's HEAD)")
    add("--json", help="file to join (default: benchmarks/results/train-step-<device type>.json)")
    add("--table", metavar="FILE", help="print what a file says, and measure nothing")
    add("--chart", metavar="FILE", help="draw a file, and measure nothing")
    add("--out", metavar="PICTURE", help="where --chart draws, .png or .svg (default: beside the file)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
