"""Which tile is the fastest for each kernel of the recorded models: all candidates of each, on the device that is here.

    python -m benchmarks.bench_tiles [--models resnet50,bert] [--only sum,var_mean] [--mib 4] [--wide] [--seconds 90]

Kernels are taken from the plans of `tests/corpus`, each text and size once, the largest share of a step first. A line has the
microseconds of the first choice and of the fastest tile, those that the kernel's bytes would take in a copy, and how often the
step launches it. `--wide` tries every shape of a tile around the first, not the few that are tried beside a running program.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.environment import keep
from kitsune.backends import nearest_arch, program_of
from kitsune.codegen import Compiler, candidates, compile_pool, is_looped, tile_of
from kitsune.ir import Launch
from kitsune.ir.program import Tile
from kitsune.planning import planner_for
from kitsune.runtime.kernel_launch import PreparedLaunch
from kitsune.runtime.timing import in_turn
from kitsune.runtime.trials import Trial
from tests.corpus import FILES, load, name_of

MODELS = "resnet50,bert,gpt2,vit"
COPIED = 512 << 20
COPIES = 10
WORKERS = 12


@dataclass
class Case:
    """A kernel of a model, and how often its step launches it."""

    model: str
    launch: Launch
    count: int = 1

    @property
    def form(self) -> str:
        """Which template it is."""
        kernel = self.launch.kernels[0]
        if not kernel.reduced:
            return "elements"
        return "long" if is_looped(kernel) else "rows"


def cases(options: argparse.Namespace) -> list[Case]:
    """The kernels of the plans that are launched by themselves and large."""
    arch = nearest_arch(*torch.cuda.get_device_capability())
    found: list[Case] = []
    for path in FILES:
        model = name_of(path).partition("-")[0]
        if "full" not in name_of(path) or model not in options.models.split(","):
            continue
        known: dict[Any, Case] = {}
        for launch in planner_for(arch, numerics="strict").plan(load(path)).launches:
            if len(launch.kernels) != 1 or launch.nbytes < options.mib << 20:
                continue
            kernel = launch.kernels[0]
            strides = tuple(a.strides for a in (*kernel.loads, *(s.access for s in kernel.stores)))
            key = (kernel.name, kernel.domain, kernel.reduced, strides)
            if key in known:
                known[key].count += 1
            else:
                known[key] = Case(model, launch)
        found += known.values()
    wanted = options.only.split(",") if options.only else [""]
    found = [case for case in found if any(part in case.launch.name for part in wanted)]
    return sorted(found, key=lambda case: -case.launch.nbytes * case.count)


def tiles(launch: Launch, wide: bool) -> list[Tile]:
    """The first choice and what is tried against it."""
    kernel = launch.kernels[0]
    few = list(candidates(kernel))
    return [*few, *(t for t in _around(kernel, few[0]) if t not in few)] if wide else few


def _around(kernel: Any, first: Tile) -> Iterator[Tile]:
    if not kernel.reduced:
        sizes = [(n, 0) for n in (256, 512, 1024, 2048, 4096)]
    else:
        rows = [n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256) if first.rows // 4 <= n <= first.rows * 4]
        widths = (8, 16, 32, 64, 128, 1024, 2048, 4096) if is_looped(kernel) else (first.columns,)
        sizes = [(h, w) for h in rows for w in widths if first.columns // 4 <= w <= first.columns * 4]
    for height, width in sizes:
        for warps in (1, 2, 4, 8, 16):
            if 4 <= height * max(width, 1) / (32 * warps) <= 64:
                yield Tile(height, width, warps)


Compiling = tuple[Case, dict[Tile, PreparedLaunch], list[Future[None]]]


def ask(case: Case, compiler: Compiler, device: torch.device, wide: bool) -> Compiling:
    """Have all tiles of a kernel compiled."""
    asked = {tile: replace(case.launch, tile=tile) for tile in tiles(case.launch, wide)}
    programs = {tile: PreparedLaunch(launch, program_of(launch), compiler, device) for tile, launch in asked.items()}
    pool = compile_pool(WORKERS)
    jobs = [pool.submit(compiler.job_of(p.program, device, *p.likely)) for p in programs.values() if p.likely]
    return case, programs, jobs


def measure(compiling: Compiling, device: torch.device, memory: torch.Tensor) -> dict[str, Any]:
    """Microseconds of each tile."""
    case, programs, jobs = compiling
    for job in jobs:
        job.exception()
    trial = Trial(case.launch, programs)
    stream = torch.cuda.current_stream(device).cuda_stream
    while not trial.is_done:
        trial.round(memory, in_turn, stream)
        torch.cuda.synchronize(device)
        if trial.is_open:
            raise RuntimeError("The device was waited for and is not through.")
    kernel = case.launch.kernels[0]
    return {
        "model": case.model,
        "kernel": kernel.name,
        "form": case.form,
        "domain": list(kernel.domain),
        "reduced": kernel.reduced,
        "bytes": case.launch.nbytes,
        "count": case.count,
        "us": {str(tile): round(us, 1) for tile, us in trial.micros.items()},
    }


def copy_rate(device: torch.device) -> float:
    """Bytes read and written per microsecond, by the library's copy."""
    source = torch.zeros(COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    for _ in range(2):
        seconds = in_turn([copy] * COPIES)
        torch.cuda.synchronize(device)
        taken = seconds()
    assert taken is not None
    return 2 * COPIED / (sorted(taken)[len(taken) // 2] * 1e6)


def line(row: dict[str, Any], first: str, rate: float, shown: int) -> str:
    """A row as text."""
    us = row["us"]
    best = min(us, key=us.__getitem__)
    others = " | ".join(f"{tile} {us[tile]:.1f}" for tile in sorted(us, key=us.__getitem__)[1:shown])
    size = "x".join(map(str, row["domain"]))
    return (
        f"{row['model'][:8]:9s}{row['kernel'][:36]:37s}{size:>18s}{row['reduced']:2d} {row['form']:9s}{row['count']:3d} x "
        f"{us[first]:7.1f} -> {us[best]:7.1f} us, copy {row['bytes'] / rate:6.1f}; {first} -> {best}; {others}"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=MODELS)
    parser.add_argument("--only", help="parts of names of kernels, with commas between")
    parser.add_argument("--mib", type=int, default=4, help="what a kernel must move at least")
    parser.add_argument("--wide", action="store_true")
    parser.add_argument("--seconds", type=float, default=90, help="begin no further kernel after that")
    parser.add_argument("--shown", type=int, default=4, help="tiles in a line")
    parser.add_argument("--cache", default="/tmp/kitsune-tiles")
    parser.add_argument("--json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(message="There is no device here, so there is nothing to measure.\n")
    start, device = time.perf_counter(), torch.device("cuda", torch.cuda.current_device())
    compiler, rate = Compiler(options.cache), copy_rate(device)
    print(f"copy: {rate / 1e6:.2f} TB/s", flush=True)
    chosen = cases(options)
    memory = torch.empty(
        max((case.launch.nbytes for case in chosen), default=0) * 2 + (64 << 20), dtype=torch.uint8, device=device
    )
    rows, before, after = [], 0.0, 0.0
    for compiling in [ask(case, compiler, device, options.wide) for case in chosen]:
        if time.perf_counter() - start > options.seconds:
            print(f"{len(chosen) - len(rows)} kernels were not measured for want of time")
            break
        launch = compiling[0].launch
        row, first = measure(compiling, device, memory), str(tile_of(launch.kernels[0]))
        if first not in row["us"]:
            print(f"{launch.name}: its first choice, {first}, cannot be started", flush=True)
            continue
        rows.append(row)
        before += row["count"] * row["us"][first]
        after += row["count"] * min(row["us"].values())
        print(line(row, first, rate, options.shown), flush=True)
    print(f"{len(rows)} kernels, by how often: {before / 1e3:.3f} ms by first choice, {after / 1e3:.3f} ms by the fastest tiles")
    print(f"kept in {keep('tiles', rows, device, options.json)}")


if __name__ == "__main__":
    main()
