"""What planning takes and what it gives, over recorded training steps and a synthetic graph of 2,000 operators. Needs no GPU.

    python -m benchmarks.bench_planning [--corpus tests/corpus] [--only gpt2] [--arch sm_90] [--rounds 5] [--json FILE]

Each row: seconds to plan (the first time, and the median of `--rounds` more), launches before (operators that are not views,
without those that nobody needs) and after, bytes of the arena, distinct kernels, and how often each reason kept operators apart.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import statistics
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kitsune
from benchmarks.environment import keep
from benchmarks.record_corpus import read_graph, record_step
from kitsune.ir import Graph, Kind, Plan

CORPUS = Path(__file__).parent.parent / "tests" / "corpus"
SYNTHETIC_OPS = 2000
Planner = Callable[[Graph, str], Plan]


def find_planner(name: str) -> Planner:
    """The function `module:function`. Raises RuntimeError if it is not there."""
    module, _, function = name.partition(":")
    try:
        found: Planner = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise RuntimeError(f"There is no planner {function} in {module}: {error}. Name another with --planner.") from error
    return found


def synthetic(n_ops: int = SYNTHETIC_OPS) -> Graph:
    """Blocks of a matrix product, a gate, a normalisation, a transposed copy and a running mean, until there are `n_ops`."""
    generator = torch.Generator().manual_seed(0)
    weight, bias, state = (torch.randn(shape, generator=generator) for shape in ((64, 64), (64,), (64, 64)))

    def block(x: Tensor) -> Tensor:
        h = x @ weight + bias
        x = x + h * torch.sigmoid(h) * 0.1
        x = (x - x.mean(1, keepdim=True)) * torch.rsqrt(x.var(1, keepdim=True) + 1e-5)
        x = torch.where(x > 0, x, x.t().contiguous())
        state.mul_(0.9).add_(x, alpha=0.1)
        return x

    def program() -> Tensor:
        x = state.clone()
        for _ in range(n_ops // 18 + 1):
            x = block(x)
        kitsune.flush()
        return x

    return record_step(program, torch.device("cpu"))[0][0]


def graphs(corpus: Path, only: str) -> Iterator[tuple[str, Graph]]:
    """The graphs to plan, by name; files of another version of torch are named and left out."""
    for path in sorted(corpus.glob("*.jsonl.gz")):
        name = path.name.removesuffix(".jsonl.gz")
        if only not in name:
            continue
        try:
            yield name, read_graph(path)
        except ValueError as lacking:
            print(f"{name} is left out: {lacking}")
    if only in "synthetic":
        yield "synthetic", synthetic()


def launches_before(graph: Graph) -> int:
    """Launches of the graph run operator by operator: all that is needed and is not a view."""
    from kitsune.scheduler import dead_code

    return sum(op.kind is not Kind.VIEW for op in dead_code(graph).ops)


def distinct_kernels(plan: Plan) -> int:
    """Generated sources: kernels of one text count once, alone and in a batch apart."""
    from kitsune.codegen import text_key

    generated = [launch.kernels for launch in plan.launches if launch.kernels]
    return len({(text_key(kernels[0]), len(kernels) > 1) for kernels in generated})


def refusals_by_reason(plan: Plan) -> dict[str, int]:
    """How often each reason was given, the most frequent first."""
    return dict(Counter(refusal.reason for refusal in plan.refusals).most_common())


def plan_seconds(planner: Planner, graph: Graph, arch: str, rounds: int) -> tuple[Plan, list[float]]:
    """The plan, and the seconds that it took each time, the first included."""
    taken = []
    for _ in range(rounds + 1):
        gc.collect()
        start = time.perf_counter()
        plan = planner(graph, arch)
        taken.append(time.perf_counter() - start)
    return plan, taken


def measure(name: str, graph: Graph, planner: Planner, arch: str, rounds: int) -> dict[str, Any]:
    """One row. A graph that cannot be planned is a row with its `error`."""
    try:
        plan, taken = plan_seconds(planner, graph, arch, rounds)
    except Exception as error:
        return {
            "graph": name,
            "ops": len(graph.ops),
            "error": traceback.format_exc(),
            "message": f"{type(error).__name__}: {error}",
        }
    return {
        "graph": name,
        "ops": len(graph.ops),
        "plan_s": round(statistics.median(taken[1:]), 5),
        "plan_range_s": [round(min(taken[1:]), 5), round(max(taken[1:]), 5)],
        "plan_first_s": round(taken[0], 5),
        "launches_before": launches_before(graph),
        "launches_after": plan.n_launches,
        "arena_bytes": plan.arena,
        "kernels": sum(len(launch.kernels) for launch in plan.launches),
        "kernel_launches": sum(bool(launch.kernels) for launch in plan.launches),
        "distinct_kernels": distinct_kernels(plan),
        "refusals": refusals_by_reason(plan),
    }


def show(row: dict[str, Any], n_reasons: int) -> None:
    """A row as a line, with its most frequent reasons below."""
    if "error" in row:
        print(f"{row['graph']:26s}{row['ops']:6d}   FAILED: {row['message']}", flush=True)
        return
    print(
        f"{row['graph']:26s}{row['ops']:6d}{row['plan_s'] * 1e3:9.1f}{row['plan_first_s'] * 1e3:9.1f}"
        f"{row['launches_before']:8d}{row['launches_after']:7d}{row['kernels']:8d}{row['distinct_kernels']:9d}"
        f"{row['arena_bytes'] / 2**20:11.1f}",
        flush=True,
    )
    for reason, n in list(row["refusals"].items())[:n_reasons]:
        print(f"    {n:5d} x {reason}")


def main() -> None:
    """Plan everything and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=CORPUS)
    parser.add_argument("--only", default="", help="only graphs whose name contains this ('synthetic' is one)")
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--reasons", type=int, default=0, help="print this many of the most frequent refusals of each graph")
    parser.add_argument("--planner", default="kitsune.planning:plan_for", help="module:function (%(default)s)")
    parser.add_argument("--json")
    options = parser.parse_args()
    try:
        planner = find_planner(options.planner)
    except RuntimeError as error:
        sys.exit(str(error))
    head = f"{'graph':26s}{'ops':>6s}{'plan ms':>9s}{'first':>9s}{'before':>8s}{'after':>7s}{'kernels':>8s}{'distinct':>9s}"
    print(f"{head}{'arena MiB':>11s}")
    rows = []
    for name, graph in graphs(options.corpus, options.only):
        rows.append(measure(name, graph, planner, options.arch, options.rounds))
        show(rows[-1], options.reasons)
    if not rows:
        sys.exit(f"There is no graph to plan in {options.corpus} with {options.only!r} in its name.")
    print(f"kept in {keep('planning', rows, torch.device('cpu'), options.json)}")
    if any("error" in row for row in rows):
        sys.exit("Some graphs could not be planned; their errors are in the file.")


if __name__ == "__main__":
    main()
