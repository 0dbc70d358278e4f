"""From nothing to replays of the fused step: how many kernels a model has, and what planning, compiling and loading take.

    python -m benchmarks.bench_cold_start [--models bert,resnet50] [--device cuda] [--workers 8] [--json FILE]

With a GPU each model trains in processes of its own, first with empty caches on disk and then with what that has left there.
Columns: distinct kernels; those compiled; seconds of planning, of preparing launches, of compiling (all of them, and from the
first to the last) and of loading, on the threads that do so; seconds from the start until the first step has ended, nothing is
made in the background any more, the step is first replayed with its kernels, and until the end of the first step that is as fast
as the last ones.

Without one the recorded steps of tests/corpus are planned and compiled for an sm_90: what is loaded and replayed is left out.
"""

from __future__ import annotations

import argparse
import gzip
import importlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import RESULTS, keep
from benchmarks.models import MODELS, make, make_batches
from benchmarks.train_step.columns import forward_of, make_step

ROOT = Path(__file__).parent.parent
CORPUS = ROOT / "tests" / "corpus"
CACHES = ("KITSUNE_CACHE_DIR", "TRITON_CACHE_DIR")
VISITS = ("empty", "warm")
N_BATCHES = 4
LONGEST_S = 90.0
# Of steps after the kernels are there: those beside which libraries make their plans, one by plan, one that is captured, and the
# first that is replayed, if that comes.
LATER_S = 10.0
# The last steps, whose median is the steady speed; and what a step may take of it, with this more, to be as fast.
LAST_STEPS, WITHIN, MORE_S = 20, 1.25, 0.0002
# Steps in a row that have to be: one alone may have had luck.
IN_A_ROW = 3


class Times:
    """Seconds spent in functions, and when each was first begun and last ended; it counts all threads."""

    def __init__(self) -> None:
        self.spent: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.first: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self._lock = threading.Lock()

    def watch(self, owner: Any, function: str, name: str) -> None:
        """Time every call of a function from here on."""
        call = getattr(owner, function)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self._add(name, start, time.perf_counter())

        setattr(owner, function, timed)

    def _add(self, name: str, start: float, end: float) -> None:
        with self._lock:
            self.spent[name] += end - start
            self.calls[name] += 1
            self.first.setdefault(name, start)
            self.last[name] = end

    def row(self) -> dict[str, Any]:
        """What is stated of a model."""
        row: dict[str, Any] = {f"{name}_s": round(self.spent[name], 3) for name in ("plan", "prepare", "compile", "load")}
        span = self.last["compile"] - self.first["compile"] if self.calls["compile"] else 0.0
        return {"compiled": self.calls["compile"], **row, "compile_span_s": round(span, 3)}


def watched() -> Times:
    """Times of what a cold start consists of, wherever it happens in this process."""
    times = Times()
    module = importlib.import_module
    for function in ("show_plan", "read_ahead"):
        times.watch(module("kitsune.coming"), function, "plan")
    times.watch(module("kitsune.runtime.plan_executor").PlanExecutor, "prepare", "prepare")
    times.watch(module("kitsune.codegen.compile_pool")._Worker, "compile", "compile")
    times.watch(module("kitsune.codegen.driver").LoadedKernel, "__init__", "load")
    return times


def train(options: argparse.Namespace) -> dict[str, Any]:
    """One model, in this process."""
    import kitsune
    from kitsune.background import wait as nothing_open

    times, device = watched(), torch.device(options.device)
    workload = make(options.models[0], device, "amp", "full")
    batches = make_batches(options.models[0], device, N_BATCHES, "full")
    step, ends, replayed = make_step(workload, forward_of(workload), "every 20"), [], []
    torch.cuda.synchronize()
    start = time.perf_counter()

    def steps(n: int) -> None:
        before = kitsune.counters()
        for _ in range(n):
            step(*batches[len(ends) % N_BATCHES])
            torch.cuda.synchronize()
            ends.append(time.perf_counter() - start)
            now = kitsune.counters()
            if now["kernels"] > before["kernels"] and now["replayed"] > before["replayed"]:
                replayed.append(ends[-1])
            before = now

    with kitsune.accelerate(device=device):
        steps(8)
        # To wait would leave the background thread alone with the processor, and `wait_for_kernels` has regions planned that
        # do not come back.
        while not nothing_open(0) and ends[-1] < LONGEST_S:
            steps(1)
        there = ends[-1]
        while not replayed and ends[-1] < there + LATER_S:
            steps(1)
        steps(LAST_STEPS)
    steady = first_steady([end - begin for begin, end in itertools.pairwise([0.0, *ends])])
    n_kernels = len({path.stem for path in Path(os.environ[CACHES[0]]).rglob("*.bin")})
    row = {"kernels": n_kernels, **times.row(), "first_step_s": ends[0], "kernels_there_s": there}
    row |= {"replayed_s": replayed[0] if replayed else None, "steady_s": None if steady is None else ends[steady]}
    return {**row, "refused": list(kitsune.counters()["graph_refused"])}


def first_steady(taken: Sequence[float]) -> int | None:
    """The number of the first step that is, with those behind it, as fast as the last ones; None if there is none. `taken` are
    the seconds of all steps."""
    limit = WITHIN * statistics.median(taken[-LAST_STEPS:]) + MORE_S
    fast = [seconds <= limit for seconds in taken]
    return next((k for k in range(len(taken) - IN_A_ROW + 1) if all(fast[k : k + IN_A_ROW])), None)


def count(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """A recorded step, planned twice, and compiled for an sm_90."""
    from kitsune.backends import program_of
    from kitsune.codegen import BackgroundCompiler, CompilePool, Compiler
    from kitsune.config import config
    from kitsune.ir import load_graph, reads_slots
    from kitsune.plan_files import planned
    from kitsune.planning import planner_for
    from kitsune.runtime.kernel_launch import PreparedLaunch

    times, text = Times(), gzip.decompress(path.read_bytes()).decode()
    times.watch(importlib.import_module("kitsune.codegen.compile_pool")._Worker, "compile", "compile")
    pool, seconds = CompilePool(options.workers), []
    with tempfile.TemporaryDirectory() as folder, config.patch(cache_dir=folder, verify=False, numerics="strict"):
        compiler = BackgroundCompiler(Compiler(Path(folder) / "kernels"), lambda: pool, lambda load: load())
        for _ in VISITS:
            graph = load_graph(text)
            seconds.append(_seconds(lambda graph=graph: planned(graph, planner_for("sm_90"))))
        plan, launches = seconds[0][1], []

        def prepare() -> None:
            for launch in plan.launches:
                if launch.kernels and any(kernel.n_elements for kernel in launch.kernels):
                    in_memory = any(map(reads_slots, launch.ops))
                    program = program_of(launch, in_memory)
                    launches.append(PreparedLaunch(launch, program, compiler, torch.device("cpu"), in_memory))

        prepare_s, _ = _seconds(prepare)
        futures = {compiler.ask(one.program, 90, *one.likely) for one in launches if one.likely}
        wait(futures)
        failed = sum(future.exception() is not None for future in futures)
    pool.close()
    row = {"kernels": len(futures), "failed": failed, **times.row(), "prepare_s": round(prepare_s, 3)}
    row |= {"plan_s": round(seconds[0][0], 3), "plan_again_s": round(seconds[1][0], 3)}
    del row["load_s"]  # there is no device
    return row


def _seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    made = call()
    return time.perf_counter() - start, made


def in_new_process(model: str, caches: dict[str, str], options: argparse.Namespace) -> dict[str, Any]:
    """A model's training in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.bench_cold_start", "--child", "--models", model, "--device", options.device]
    environment = {**os.environ, **caches, "KITSUNE_GATE": "0"}
    if options.workers:
        environment["KITSUNE_COMPILE_WORKERS"] = str(options.workers)
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=options.timeout)
    if done.returncode:
        sys.exit(f"{model}: exit {done.returncode}\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


COLUMNS = (
    ("kernels", "kernels"), ("compiled", "compiled"), ("plan_s", "plan s"), ("plan_again_s", "again"), ("prepare_s", "prepare"),
    ("compile_s", "compile"), ("compile_span_s", "from-to"), ("load_s", "load"), ("first_step_s", "1st step"),
    ("kernels_there_s", "there"), ("replayed_s", "replayed"), ("steady_s", "steady"),
)  # fmt: skip


def show(row: dict[str, Any]) -> None:
    """A row of the table; a dash for what was not measured or did not happen."""
    cells = [row.get(name) for name, _ in COLUMNS]
    texts = ["-" if cell is None else f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells]
    print(f"{row['model']:24s}{row['caches']:7s}" + "".join(f"{text:>9s}" for text in texts), flush=True)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", type=lambda text: text.split(","), help="some of " + ",".join(MODELS) + "; without a GPU parts of names")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--workers", type=int, help="processes that compile (by default as many as Kitsune takes, 2 without a GPU)")
    add("--timeout", type=float, default=200.0, help="seconds that a process may take (%(default)s)")
    add("--json")
    add("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure and print; with --child, one process's part of it."""
    options = parse()
    if options.child:
        print(json.dumps(train(options)))
        return
    print(f"{'model':24s}{'caches':7s}" + "".join(f"{head:>9s}" for _, head in COLUMNS))
    rows: list[dict[str, Any]] = []
    device = torch.device(options.device)
    if device.type == "cuda":
        for model in options.models or MODELS:
            with tempfile.TemporaryDirectory() as folder:
                caches = {variable: str(Path(folder) / variable) for variable in CACHES}
                for visit in VISITS:
                    rows.append({"model": model, "caches": visit, **in_new_process(model, caches, options)})
                    show(rows[-1])
    else:
        options.workers = options.workers or 2
        for path in sorted(CORPUS.glob("*.jsonl.gz")):
            name = path.name.partition(".")[0]
            if any(part in name for part in options.models or ["full"]):
                rows.append({"model": name, "caches": "empty", **count(path, options)})
                show(rows[-1])
    print(f"kept in {keep('cold-start', rows, device, options.json or str(RESULTS / f'cold-start-{device.type}.json'))}")


if __name__ == "__main__":
    main()
