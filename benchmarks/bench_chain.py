"""How near a chain of eight pointwise operators comes to the bandwidth of a copy: eager, Kitsune and torch.compile.

    python -m benchmarks.bench_chain [--mib 256] [--runs 30] [--only kitsune] [--json FILE]

GB/s count each input read once and each output written once, whatever was really moved. On CUDA the time is that of the kernels
alone, from torch.profiler, so that a slow host does not count; on a CPU it is that of the call, and only shows that all works.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import kitsune
from benchmarks.device_trace import trace
from benchmarks.environment import keep

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WARM_UP = 5
Run = Callable[[], Tensor]


def chain(x: Tensor, y: Tensor) -> Tensor:
    """Eight operators on two inputs."""
    h = x * 0.5
    h = h + y
    h = torch.relu(h)
    h = h * x
    h = h - y
    h = torch.abs(h)
    h = h * 1.25
    return h + x


def under_kitsune(x: Tensor, y: Tensor) -> Tensor:
    """The chain as one region."""
    out = chain(x, y)
    kitsune.flush()
    return out


def micros(run: Run, runs: int, device: torch.device, but: str = "") -> tuple[list[float], float | None]:
    """Microseconds of each run, and launches per run where there is a device that counts them: all `but` those of a name."""
    for _ in range(WARM_UP):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize()

        def repeat() -> None:
            for _ in range(runs):
                run()

        seen = trace(repeat).without(but)
        return seen.chunks(runs), len(seen.launches) / runs
    taken = []
    for _ in range(runs):
        start = time.perf_counter()
        run()
        taken.append((time.perf_counter() - start) * 1e6)
    return taken, None


def row_of(name: str, dtype: str, taken: list[float], launches: float | None, nbytes: int) -> dict[str, Any]:
    """Medians and quartiles."""
    low, middle, high = statistics.quantiles(taken, n=4)
    return {
        "what": name,
        "dtype": dtype,
        "us": round(middle, 2),
        "quartiles_us": [round(low, 2), round(high, 2)],
        "launches": launches,
        "bytes": nbytes,
        "GB/s": round(nbytes / middle / 1e3, 1),
    }


def measure(dtype: str, options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """The rows of one dtype; the copy comes first, for the others to be compared with."""
    n = int(options.mib * 2**20) // DTYPES[dtype].itemsize
    x, y = (torch.rand(n, device=device).to(DTYPES[dtype]) for _ in range(2))
    target = torch.empty_like(x)
    rows = [row_of("copy", dtype, *micros(lambda: target.copy_(x), options.runs, device), 2 * x.nbytes)]
    expected = chain(x, y)
    programs = {"eager": chain, "kitsune": under_kitsune, "compile": torch.compile(chain)}
    for name, program in programs.items():
        if options.only and name not in options.only.split(","):
            continue
        rows.append(_measure_program(name, program, (x, y), expected, dtype, options.runs, device))
    for row in rows:
        row["of_copy_%"] = round(100 * row["GB/s"] / rows[0]["GB/s"], 1)
        _show(row)
    return rows


def _measure_program(
    name: str,
    program: Callable[[Tensor, Tensor], Tensor],
    inputs: tuple[Tensor, Tensor],
    expected: Tensor,
    dtype: str,
    runs: int,
    device: torch.device,
) -> dict[str, Any]:
    if name == "kitsune":
        kitsune.reset()
        with kitsune.accelerate(device=device):
            taken, launches = micros(lambda: program(*inputs), runs, device)
            found = program(*inputs)
    else:
        taken, launches = micros(lambda: program(*inputs), runs, device)
        found = program(*inputs)
    row = row_of(name, dtype, taken, launches, 3 * expected.nbytes)
    return row | {"equals_eager": bool(torch.equal(found, expected)), "max_error": float((found - expected).abs().max())}


def _show(row: dict[str, Any]) -> None:
    low, high = row["quartiles_us"]
    line = f"{row['what']:9s}{row['dtype']:10s}{row['us']:10.1f} us ({low:.1f} to {high:.1f}){row['GB/s']:9.1f} GB/s"
    line += f"{row['of_copy_%']:7.1f} % of copy"
    if row["launches"] is not None:
        line += f", {row['launches']:g} launches"
    if "equals_eager" in row:
        line += ", bits of eager" if row["equals_eager"] else f", off by {row['max_error']:.3g}"
    print(line, flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--mib", type=float, help="size of each input (default: 256, on a CPU 16)")
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--only", help="some of eager,kitsune,compile")
    parser.add_argument("--json")
    options = parser.parse_args()
    device = torch.device(options.device)
    options.mib = options.mib or (256 if device.type == "cuda" else 16)
    if device.type != "cuda":
        print("Without CUDA these are times of calls on the host: how near a kernel comes to a copy can only be seen on a GPU.")
    with torch.no_grad():
        rows = [row for dtype in DTYPES for row in measure(dtype, options, device)]
    print(f"kept in {keep('chain', rows, device, options.json)}")


if __name__ == "__main__":
    main()
