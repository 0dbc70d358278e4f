"""Record the graph of a training step of each model, for tests and planning benchmarks that need no model and no GPU.

    python -m benchmarks.record_corpus --out tests/corpus --device cpu --models all --size small --precision amp

`--models demo` records the two models of `python -m kitsune demo` instead, with their own optimizers, in `demo-<model>-<device>`.

Each file `<model>-<size>-<precision>-<device>.jsonl.gz` holds the biggest region of a step that was recorded lazily from its
first operator to its last, so that the graph's outputs are what was alive when the step ended. The losses are compared with
those of eager from the same seed. Exits with 1 if a model could not be recorded or its graph does not survive the round trip.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import kitsune
from benchmarks.models import MODELS, make
from kitsune.demo import train as demo
from kitsune.ir import Graph, Kind, verify
from kitsune.ir.serial import dump_graph, load_graph
from kitsune.session import trace_regions

# Gradients and optimizer state come into being in the first two steps: the third is the first that can have been seen before.
STEPS = 3
PATIENCE = 6
DEMOS = tuple(f"demo-{model}" for model in demo.MODELS)
Step = Callable[[], Tensor]


def record_step(step: Step, device: torch.device) -> tuple[list[Graph], list[Tensor]]:
    """The regions of the first step, from the third on, that was lazy throughout, biggest first, and the losses up to there."""
    kitsune.reset()
    losses: list[Tensor] = []
    with kitsune.accelerate(warmup=1, device=device), trace_regions() as graphs:
        while len(losses) < PATIENCE:
            before, seen = kitsune.counters(), len(graphs)
            losses.append(step())
            after, regions = kitsune.counters(), graphs[seen:]
            lazy = after["observed"] == before["observed"] and after["recorded"] > before["recorded"]
            if lazy and len(losses) >= STEPS:
                return sorted(regions, key=lambda graph: -len(graph.ops)), losses
    raise RuntimeError(f"No step out of {PATIENCE} was recorded from end to end.\n{kitsune.explain()}")


def write_graph(graph: Graph, path: Path) -> int:
    """Write a graph and read it back; returns the size of the file. Raises ValueError if it reads differently."""
    text = dump_graph(graph)
    again = load_graph(text)
    verify(again)
    if str(again) != str(graph) or dump_graph(again) != text:
        raise ValueError(f"The graph for {path.name} is not the same after writing and reading it.")
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without a time stamp, so that recording the same step again gives the same file.
    path.write_bytes(gzip.compress(text.encode(), mtime=0))
    return path.stat().st_size


def read_graph(path: Path) -> Graph:
    """The graph of one corpus file. Raises ValueError if this version of torch lacks one of its operators."""
    return load_graph(gzip.decompress(path.read_bytes()).decode())


def kinds(graph: Graph) -> dict[str, int]:
    """Operators by kind, in the order of the enumeration."""
    counted = Counter(op.kind.name for op in graph.ops)
    return {kind.name: counted[kind.name] for kind in Kind}


def compare_losses(lazy: list[Tensor], eager: list[Tensor]) -> str:
    """Whether two trainings from one seed had the same losses, in words."""
    pairs = [(a.item(), b.item()) for a, b in zip(lazy, eager, strict=True)]
    if all(a == b for a, b in pairs):
        return "losses equal eager's"
    return f"LOSSES DIFFER from eager's by up to {max(abs(a - b) for a, b in pairs):.3g}"


def build_demo(model: str, device: torch.device) -> Step:
    """A step of the demo: its data, its schedule and its clipping."""
    torch.manual_seed(0)
    task = demo.build(model, PATIENCE, device)
    train_step = demo.make_train_step(task)
    batches = task.data.batches(PATIENCE, task.batch_size, torch.Generator().manual_seed(0))

    def step() -> Tensor:
        x, y = next(batches)
        return train_step(x.to(device), y.to(device))

    return step


def record_model(name: str, options: argparse.Namespace, device: torch.device) -> str:
    """Record one model, write its file, and say what is in it."""
    is_demo = name.startswith("demo-")

    def build() -> Step:
        if is_demo:
            return build_demo(name.removeprefix("demo-"), device)
        return make(name, device, options.precision, options.size, options.optimizer).step

    regions, lazy = record_step(build(), device)
    graph = regions[0]
    losses = [loss.cpu() for loss in lazy]
    del lazy
    kitsune.reset()
    _release(device)
    eager = build()
    told = compare_losses(losses, [eager().cpu() for _ in losses])
    details = "" if is_demo else f"-{options.size}-{options.precision}"
    size = write_graph(graph, Path(options.out) / f"{name}{details}-{device.type}.jsonl.gz")
    counted = " ".join(f"{kind} {n}" for kind, n in kinds(graph).items())
    ends = f"{len(graph.inputs)} inputs, {len(graph.outputs)} outputs"
    if len(regions) > 1:
        ends += f", the biggest of {len(regions)} regions in the step"
    return f"{name:10s} {len(graph.ops):5d} ops: {counted}; {ends}; {size / 1024:.0f} KiB; {told}"


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main() -> None:
    """Record what was asked for; a model that fails does not stop the others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", default="all", help=f"'all', 'demo', or some of {','.join(MODELS + DEMOS)}")
    parser.add_argument("--size", choices=("small", "full"), default="small")
    parser.add_argument("--precision", choices=("amp", "fp32"), default="amp")
    parser.add_argument("--optimizer", choices=("fused", "foreach"), help="default: fused for amp on cuda, else torch's default")
    options = parser.parse_args()
    device = torch.device(options.device)
    failed = []
    groups = {"all": MODELS, "demo": DEMOS}
    for name in groups.get(options.models) or options.models.split(","):
        try:
            print(record_model(name, options, device), flush=True)
        except Exception:
            failed.append(name)
            print(f"{name:10s} FAILED\n{traceback.format_exc()}", flush=True)
        _release(device)
    if failed:
        sys.exit(f"Not recorded: {', '.join(failed)}.")


if __name__ == "__main__":
    main()
