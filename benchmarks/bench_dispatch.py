"""What recording costs on the host, per op, and what `import kitsune` adds to `import torch`.

    python -m benchmarks.bench_dispatch [--device cpu] [--ops 2000] [--rounds 25] [--import-rounds 5] [--json FILE]

Each row times a chain of equal ops on 8 x 8 tensors: eager; recorded when known (the region was seen before); recorded when
unknown with warmup=0 (types inferred, region grown) and observed with warmup=1 (the same and run at once); and the flush, which
is the replay executor. Eager, known and flush are timed in turn, round by round, so that a change of the machine's speed meets
all of them.
"""

import argparse
import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

import kitsune
from benchmarks.environment import keep

Chain = Callable[[int], torch.Tensor]


def chains(device: torch.device) -> dict[str, Chain]:
    """The programs that are timed; each takes the number of ops."""
    x = torch.randn(8, 8, device=device)

    def views(n: int) -> torch.Tensor:
        # Of one tensor: a view of a view of a view keeps its whole history for autograd.
        z = x.clone()
        for _ in range(n - 1):
            y = z.t()
        return y

    def repeat(op: Callable[[torch.Tensor], torch.Tensor]) -> Chain:
        def chain(n: int) -> torch.Tensor:
            y = x.clone()
            for _ in range(n - 1):
                y = op(y)
            return y

        return chain

    return {
        "add": repeat(lambda y: y + x),
        "mul_scalar": repeat(lambda y: y * 0.5),
        "add_in_place": repeat(lambda y: y.add_(x)),
        "mm": repeat(lambda y: torch.mm(y, x)),
        "view": views,
    }


def micros(chain: Callable[[], Any], n: int) -> float:
    """Microseconds per op of one call."""
    start = time.perf_counter()
    chain()
    return (time.perf_counter() - start) / n * 1e6


def first_sight(chain: Chain, n: int, rounds: int, warmup: int, device: torch.device) -> list[float]:
    """A region that was never seen, each round."""
    times = []
    for _ in range(rounds):
        kitsune.reset()
        gc.collect()
        with kitsune.accelerate(warmup=warmup, device=device):
            torch.zeros(1, device=device)  # the first op of a context looks up its region's root
            kitsune.flush()
            times.append(micros(lambda: chain(n), n))
    return times


def measure(name: str, chain: Chain, n: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """One row: medians, and quartiles of the known op over eager."""
    unknown = first_sight(chain, n, max(3, rounds // 5), 0, device)
    observed = first_sight(chain, n, max(3, rounds // 5), 1, device)
    eager, known, flushed = [], [], []
    kitsune.reset()
    for _ in range(rounds + 2):
        gc.collect()
        eager.append(micros(lambda: chain(n), n))
        with kitsune.accelerate(warmup=0, device=device):
            kept: list[Any] = []
            known.append(micros(lambda: kept.append(chain(n)), n))  # noqa: B023 - called at once
            flushed.append(micros(kitsune.flush, n))
    counted = kitsune.counters()
    if counted["recorded"] < n * rounds:
        raise RuntimeError(f"{name} was not recorded: {counted}")
    over = [k - e for k, e in zip(known[2:], eager[2:], strict=True)]
    quartiles = statistics.quantiles(over, n=4)
    return {
        "op": name,
        "eager_us": round(statistics.median(eager[2:]), 2),
        "known_us": round(statistics.median(known[2:]), 2),
        "known_over_eager_us": round(quartiles[1], 2),
        "known_over_eager_quartiles_us": [round(quartiles[0], 2), round(quartiles[2], 2)],
        "unknown_us": round(statistics.median(unknown), 2),
        "observed_us": round(statistics.median(observed), 2),
        "flush_us": round(statistics.median(flushed[2:]), 2),
    }


def import_seconds(rounds: int) -> dict[str, Any]:
    """Seconds that a new interpreter takes to import torch, alone and with kitsune; the two in turn."""
    times: dict[str, list[float]] = {"torch": [], "torch, kitsune": []}
    for _ in range(rounds):
        for modules, taken in times.items():
            code = f"import time; s = time.perf_counter(); import {modules}; print(time.perf_counter() - s)"
            taken.append(float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout))
    alone, both = (statistics.median(taken) for taken in times.values())
    return {
        "import_torch_s": round(alone, 3),
        "import_both_s": round(both, 3),
        "import_kitsune_adds_s": round(both - alone, 3),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ops", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--import-rounds", type=int, default=5, help="0 leaves the imports out")
    parser.add_argument("--json")
    options = parser.parse_args()
    device = torch.device(options.device)
    rows: list[dict[str, Any]] = []
    print(f"{'us per op':14s}{'eager':>8s}{'known':>8s}{'over eager':>12s}{'unknown':>9s}{'observed':>10s}{'flush':>8s}")
    for name, chain in chains(device).items():
        row = measure(name, chain, options.ops, options.rounds, device)
        rows.append(row)
        print(
            f"{name:14s}{row['eager_us']:8.2f}{row['known_us']:8.2f}{row['known_over_eager_us']:12.2f}"
            f"{row['unknown_us']:9.2f}{row['observed_us']:10.2f}{row['flush_us']:8.2f}"
        )
    if options.import_rounds:
        rows.append(import_seconds(options.import_rounds))
        print(f"import kitsune adds {rows[-1]['import_kitsune_adds_s']} s to {rows[-1]['import_torch_s']} s of import torch")
    print(f"kept in {keep('dispatch', rows, device, options.json)}")


if __name__ == "__main__":
    main()
