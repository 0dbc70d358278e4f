"""`python -m tests.benchmarks.baseline`: the models of the documents in plain PyTorch, and with Kitsune beside it."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence

import torch

from kitsune import KitsuneOptimizer
from tests.benchmarks import BenchmarkConfig, run_baseline_benchmark
from tests.benchmarks.models import MODELS


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a summary of each model that is asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.baseline", description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--kitsune", action="store_true", help="measure the same loop with KitsuneOptimizer, too")
    given = parser.parse_args(arguments)
    for name in given.models:
        create, size = MODELS[name]
        config = BenchmarkConfig(given.batch_size, given.iterations, given.warmup, given.device, input_size=size)
        torch.manual_seed(0)
        print(f"{name}\n{run_baseline_benchmark(create(), config).summary()}")
        if given.kitsune:
            torch.manual_seed(0)
            wrapped = run_baseline_benchmark(
                create(), config, lambda p: KitsuneOptimizer(torch.optim.Adam, p, enable_fusion=True)
            )
            print(f"{name} with KitsuneOptimizer\n{wrapped.summary()}")


if __name__ == "__main__":
    warnings.simplefilter("default")
    main()
