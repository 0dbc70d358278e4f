"""What an odd dimension costs a matrix product, and what padding gains: the three products of GPT-2's vocabulary, eager ops.

    python -m benchmarks.bench_padding [--rows 8192] [--vocabulary 50257] [--hidden 768] [--runs 20] [--json FILE]

Each product (logits, the gradient of the hidden states, that of the weight) is timed
- `plain`: every matrix contiguous, so that the logits' rows begin at odd addresses;
- `stride N`: the logits and their gradient as parts of wider matrices whose rows are a multiple of N apart, sizes as they are;
- `size N`: the dimension itself rounded up to a multiple of N, what is added being zero and ignored.
`cast` is what it costs to write the logits' gradient from float32, and to read the logits as float32, with such rows.
Each result is compared with the product in float32.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.environment import keep

MULTIPLES = (8, 32, 64, 128)
WARM_UP = 3
Run = Callable[[], Tensor]


def milliseconds(run: Run, runs: int, device: torch.device) -> list[float]:
    """The device's time for each run; on a CPU that of the call, which only shows that all works."""
    for _ in range(WARM_UP):
        run()
    if device.type != "cuda":
        taken = []
        for _ in range(runs):
            start = time.perf_counter()
            run()
            taken.append((time.perf_counter() - start) * 1e3)
        return taken
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(runs + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize(device)
    return [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]


def rounded(n: int, multiple: int) -> int:
    """The next multiple."""
    return -(-n // multiple) * multiple


def wide(rows: int, columns: int, width: int, like: Tensor) -> Tensor:
    """A matrix of zeros whose rows are `width` elements apart."""
    return like.new_zeros(rows, width)[:, :columns]


class Products:
    """The operands of the three products, with the logits laid out so; `size` is the vocabulary as the library sees it."""

    def __init__(self, options: argparse.Namespace, device: torch.device, size: int, width: int) -> None:
        rows, vocabulary = options.rows, options.vocabulary
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        self.hidden = normal(rows, options.hidden).bfloat16()
        self.weight = torch.zeros(size, options.hidden, dtype=torch.bfloat16, device=device)
        self.weight[:vocabulary] = normal(vocabulary, options.hidden).bfloat16()
        self.full = torch.zeros(rows, size, device=device)
        self.full[:, :vocabulary] = normal(rows, vocabulary)
        self.logits = wide(rows, size, width, self.hidden)
        self.grad = wide(rows, size, width, self.hidden).copy_(self.full)
        self.grad_hidden = torch.empty_like(self.hidden)
        self.grad_weight = torch.empty_like(self.weight)

    def runs(self) -> dict[str, Run]:
        """What is timed."""
        return {
            "logits": lambda: torch.mm(self.hidden, self.weight.t(), out=self.logits),
            "grad_hidden": lambda: torch.mm(self.grad, self.weight, out=self.grad_hidden),
            "grad_weight": lambda: torch.mm(self.grad.t(), self.hidden, out=self.grad_weight),
            "cast to": lambda: self.grad.copy_(self.full),
            "cast from": lambda: self.full.copy_(self.logits),
        }

    def exact(self, name: str) -> Tensor | None:
        """The product in float32, where there is one."""
        hidden, weight, grad = self.hidden.float(), self.weight.float(), self.grad
        if name == "logits":
            return hidden @ weight.t()
        if name == "grad_hidden":
            return grad.float() @ weight
        return grad.float().t() @ hidden if name == "grad_weight" else None


def measure(what: str, products: Products, options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """A row for each product."""
    rows = []
    for name, run in products.runs().items():
        taken = milliseconds(run, options.runs, device)
        row = {"what": what, "product": name, "ms": round(statistics.median(taken), 3), "worst_ms": round(max(taken), 3)}
        exact = products.exact(name)
        if exact is not None:
            row["error"] = float((run().float() - exact).abs().max() / exact.abs().max())
        rows.append(row)
        print(
            f"{what:12s}{name:14s}{row['ms']:9.3f} ms" + (f"   off by {row['error']:.2e}" if exact is not None else ""),
            flush=True,
        )
    total = sum(row["ms"] for row in rows[:3])
    print(f"{what:12s}{'the products':14s}{total:9.3f} ms", flush=True)
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=50257)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--json")
    options = parser.parse_args()
    device = torch.device(options.device)
    n = options.vocabulary
    layouts = [("plain", n, n)]
    layouts += [(f"stride {m}", n, rounded(n, m)) for m in MULTIPLES]
    layouts += [(f"size {m}", rounded(n, m), rounded(n, m)) for m in MULTIPLES]
    rows = []
    with torch.no_grad():
        for what, size, width in layouts:
            rows += measure(what, Products(options, device, size, width), options, device)
    print(f"kept in {keep('padding', rows, device, options.json)}")


if __name__ == "__main__":
    main()
