"""What Kitsune costs where the gate leaves the steps to eager: a CPU, and programs whose batch size changes all the time.

    python -m benchmarks.bench_gate [--rounds 9] [--steps 10] [--threads 2] [--json FILE]

Each row trains a model of the demo twice, eagerly and under one of the forms of Kitsune, in turn, a few steps at a time. Steps
until the gate has decided are reported, and are not in the figures: those are the least disturbed block's and the median over
the blocks, each over eager's. The last rows are a program with 100 batch sizes in random order.
"""

import argparse
import contextlib
import gc
import random
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import kitsune
from benchmarks.environment import keep
from benchmarks.timing import millis
from kitsune.demo.train import build, make_train_step

Step = Callable[[], Any]
FORMS = ("context", "decorator", "optimizer")
SIZES = 100
# More than the gate takes to decide.
UNTIL_DECIDED = 60


def demo_step(model: str, form: str | None, device: torch.device) -> Step:
    """A training step of the demo."""
    torch.manual_seed(0)
    task = build(model, 10_000, device)
    if form == "optimizer":
        task.optimizer = kitsune.KitsuneOptimizer(task.optimizer, device=device, enable_fusion=True)
    train_step = make_train_step(task)
    if form == "decorator":
        train_step = kitsune.accelerate(device=device)(train_step)
    batches = [(x.to(device), y.to(device)) for x, y in task.data.batches(20, task.batch_size, torch.Generator().manual_seed(0))]
    n = iter(range(10**9))
    return lambda: train_step(*batches[next(n) % len(batches)])


def changing_step(form: str | None, device: torch.device) -> Step:
    """A step of a small network on a batch of a size that is drawn anew."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.GELU(), torch.nn.Linear(256, 10)).to(device)
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    if form == "optimizer":
        optimizer = kitsune.KitsuneOptimizer(optimizer, device=device, enable_fusion=True)
    x, y = torch.randn(SIZES, 256, device=device), torch.randint(10, (SIZES,), device=device)
    draw = random.Random(0)

    def step() -> None:
        n = draw.randrange(1, SIZES + 1)
        optimizer.zero_grad()
        F.cross_entropy(model(x[:n]), y[:n]).backward()
        optimizer.step()

    return kitsune.accelerate(device=device)(step) if form == "decorator" else step


def millis_in(step: Step, steps: int, device: torch.device, inside: Any) -> float:
    """Milliseconds per step of some steps, in a context."""
    gc.collect()
    with inside:
        return millis(step, steps, device)


def measure(name: str, form: str, make: Callable[[str | None], Step], options: Any, device: torch.device) -> dict[str, Any]:
    """One row."""
    kitsune.reset()
    eager, ours = make(None), make(form)
    context = kitsune.accelerate(device=device) if form == "context" else contextlib.nullcontext()
    decided_after = 0
    while not kitsune.counters()["gate_left"] and decided_after < UNTIL_DECIDED:
        millis_in(ours, 1, device, context)
        decided_after += 1
    millis_in(eager, options.steps, device, contextlib.nullcontext())
    ratios, eagers, mine = [], [], []
    for _ in range(options.rounds):
        eagers.append(millis_in(eager, options.steps, device, contextlib.nullcontext()))
        mine.append(millis_in(ours, options.steps, device, context))
        ratios.append(mine[-1] / eagers[-1])
    return {
        "program": name,
        "form": form,
        "eager_ms": round(min(eagers), 3),
        "kitsune_ms": round(min(mine), 3),
        "ratio": round(min(mine) / min(eagers), 3),
        "median_ratio": round(statistics.median(ratios), 3),
        "decided_after_steps": decided_after,
        "decided": list(kitsune.counters()["gate_decided"]),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    programs: dict[str, Callable[[str | None], Step]] = {
        "lenet": lambda form: demo_step("lenet", form, device),
        "gpt": lambda form: demo_step("gpt", form, device),
        f"{SIZES} batch sizes": lambda form: changing_step(form, device),
    }
    rows = []
    print(f"{'program':18s}{'form':12s}{'eager ms':>10s}{'kitsune ms':>12s}{'ratio':>8s}{'median':>8s}{'decided after':>15s}")
    with kitsune.config.patch(gate=True):
        for name, make in programs.items():
            for form in FORMS:
                row = measure(name, form, make, options, device)
                rows.append(row)
                print(
                    f"{name:18s}{form:12s}{row['eager_ms']:10.3f}{row['kitsune_ms']:12.3f}{row['ratio']:8.3f}"
                    f"{row['median_ratio']:8.3f}{row['decided_after_steps']:9d} steps"
                )
    print(f"kept in {keep('gate', rows, device, options.json)}")


if __name__ == "__main__":
    main()
