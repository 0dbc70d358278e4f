"""A graph network's step, eager and under Kitsune: scattered sums, a mask for the loss, an evaluation behind each step.

    python -m benchmarks.bench_graph_network [--rounds 12] [--steps 40] [--json FILE]

A GCN of two layers on a random graph of Cora's sizes (2,708 nodes of 1,433 features, 10,556 edges), with Adam. The loss is
that of a twentieth of the nodes, taken by their numbers or by a mask, of which eager counts the places on the host. Eager and
Kitsune take turns, each with a model of its own, once Kitsune has its kernels and the gate has decided.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kitsune
from benchmarks.environment import keep
from benchmarks.timing import millis

NODES, EDGES, FEATURES, HIDDEN, CLASSES = 2708, 10556, 1433, 16, 7
# Steps until kernels are asked for, and after they have come until the gate has decided; seconds to wait for them.
FIRST, SETTLED, WAIT_S = 30, 150, 60.0
LOOPS = [(mask, evaluates) for mask in (False, True) for evaluates in (False, True)]


class Conv(nn.Module):
    """Each node's sum over its neighbours, by both their degrees."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.linear, self.bias = nn.Linear(n_in, n_out, bias=False), nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        row, column = edges[0], edges[1]
        degree = x.new_zeros(len(x)).scatter_add_(0, column, torch.ones_like(column, dtype=x.dtype))
        weight = (degree + 1).pow(-0.5)
        x = self.linear(x)
        sent = x[row] * (weight[row] * weight[column]).view(-1, 1)
        return x.new_zeros(len(x), x.shape[1]).scatter_add_(0, column.view(-1, 1).expand_as(sent), sent) + self.bias


class Network(nn.Module):
    """Two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Conv(FEATURES, HIDDEN), Conv(HIDDEN, CLASSES)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        hidden = F.dropout(F.relu(self.first(x, edges)), 0.5, self.training)
        return self.second(hidden, edges)  # type: ignore[no-any-return]


def make_step(device: torch.device, mask: bool, evaluates: bool) -> Callable[[], Tensor]:
    """One step of a training of its own."""
    torch.manual_seed(0)
    edges, x = torch.randint(0, NODES, (2, EDGES), device=device), torch.rand(NODES, FEATURES, device=device)
    target, trained = torch.randint(0, CLASSES, (NODES,), device=device), torch.rand(NODES, device=device) < 0.05
    model = Network().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=5e-4)
    chosen, others = trained if mask else trained.nonzero()[:, 0], ~trained

    def step() -> Tensor:
        model.train()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x, edges)[chosen], target[chosen])
        loss.backward()
        optimizer.step()
        if evaluates:
            model.eval()
            with torch.no_grad():
                (model(x, edges)[others].argmax(1) == target[others]).float().mean()
        return loss.detach()

    return step


def compare(device: torch.device, mask: bool, evaluates: bool, options: argparse.Namespace) -> dict[str, Any]:
    """A row: milliseconds of a step, and what became of it."""
    kitsune.reset()
    steps = {name: make_step(device, mask, evaluates) for name in ("eager", "kitsune")}
    under: dict[str, Callable[[], Any]] = {"eager": contextlib.nullcontext, "kitsune": lambda: kitsune.accelerate(device=device)}
    for name, step in steps.items():
        with under[name]():
            for _ in range(FIRST):
                step()
            kitsune.wait_for_kernels(WAIT_S)
            for _ in range(SETTLED if name == "kitsune" else FIRST):
                step()
    before, taken = kitsune.counters(), {name: list[float]() for name in steps}
    for _ in range(options.rounds):
        for name, step in steps.items():
            with under[name]():
                step()
                taken[name].append(millis(step, options.steps, device))
    after = kitsune.counters()
    low, middle, high = statistics.quantiles([k / e for e, k in zip(taken["eager"], taken["kitsune"], strict=True)], n=4)
    row: dict[str, Any] = {"mask": mask, "evaluates": evaluates}
    row |= {f"{name}_ms": round(statistics.median(ms), 3) for name, ms in taken.items()}
    row |= {"ratio": round(middle, 3), "quartiles": [round(low, 3), round(high, 3)], "gate": list(after["gate_decided"])}
    n = options.rounds * (options.steps + 1)
    return row | {name: round((after[name] - before[name]) / n, 2) for name in ("backwards_followed", "replayed", "realized")}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--json")
    options = parser.parse_args()
    device, rows = torch.device(options.device), []
    for mask, evaluates in LOOPS:
        with kitsune.config.patch(gate=True):
            rows.append(row := compare(device, mask, evaluates, options))
        print(
            f"{'mask' if mask else 'numbers':8s} {'with' if evaluates else 'no'} evaluation: eager {row['eager_ms']} ms, Kitsune "
            f"{row['kitsune_ms']} ms, {row['ratio']} of it ({row['quartiles'][0]} to {row['quartiles'][1]}); {row['gate']}; of a "
            f"step {row['backwards_followed']} backwards followed, {row['replayed']} replayed, {row['realized']} realized",
            flush=True,
        )
    print(f"kept in {keep('graph-network', rows, device, options.json)}")


if __name__ == "__main__":
    main()
