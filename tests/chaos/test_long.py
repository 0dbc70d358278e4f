"""Programs without an end: operators that nobody reads, deep graphs, and batches of ever new sizes."""

from __future__ import annotations

import gc
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kitsune
from kitsune.backends import program_of
from kitsune.lazy.trie import Node
from tests.chaos.counting import Counts, Loop, lazily, many
from tests.plan.recorded import plan_of


def test_operators_without_a_read(counts: Counts) -> None:
    """Regions are bounded by themselves: memory does not grow with the program."""
    n = many(3_000, 100_000)

    def program(context: Callable[[], Any]) -> list[Tensor]:
        x = torch.linspace(-1, 1, 256)
        with context():
            for _ in range(n // 2):
                x = x * 0.999 + 0.001
        return [x.clone()]

    with kitsune.config.patch(max_pending_ops=1_000):
        counts.check(f"{n} operators", program)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        counts.check(f"{n} operators again", program)
    # Of 100,000 tensors, wrappers alone would be 100 MB.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000
    assert kitsune.counters()["flushed"]["BOUND"] >= 2 * (n // 1_000 - 1)


def host_bytes() -> int:
    """What this process has in memory."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux says there how much memory a process has")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_many_steps_leave_nothing_behind(device: str, counts: Counts) -> None:
    """As much memory is in use after all of the steps as after a fifth of them, and they end where eager's do."""
    n = many(1_000, 100_000)
    grown = [0]

    def program(context: Callable[[], Any]) -> list[Tensor]:
        loop = Loop().on(device)
        with context():
            for i in range(n):
                loop.step(i)
                if i % 100 == 99:
                    loop.losses[:] = [loop.losses[-1] * 1]
                    loop.losses[0].item()
                if i in (n // 5 - 1, n - 1):
                    of_device = torch.cuda.memory_allocated() if device == "cuda" else 0
                    grown.append(host_bytes() + of_device)
        return loop.state()

    counts.check(f"{n} steps", program, lambda: kitsune.accelerate(device=device))
    assert kitsune.counters()["backwards_followed"] > n - 200
    # A thousandth of a page for each step would be 0.3 MB.
    assert grown[-1] - grown[-2] < 4 << 20, grown


def test_a_deep_graph(counts: Counts) -> None:
    """Nothing recurses as deep as the graph is, and the backward is eager's."""
    n = many(300, 10_000)

    def program(context: Callable[[], Any]) -> list[Any]:
        w = nn.Parameter(torch.linspace(0.5, 1, 8))
        found = []
        for _ in range(3):
            with context():
                x = w
                for _ in range(n):
                    x = x.sin()
                x.sum().backward()
            assert w.grad is not None
            found.append(w.grad.clone())
            w.grad = None
        return found

    counts.check(f"{n} layers", program)


def test_batches_of_ever_new_sizes(counts: Counts) -> None:
    """Each is recorded or left to eager, none is taken for another, and what is known of them is forgotten in time."""
    n = many(16, 1_000)

    def program(context: Callable[[], Any]) -> list[Tensor]:
        loop = Loop()
        with context():
            for i in range(n):
                size = 1 + (i * 617) % n
                loop.xs[i % 16] = torch.linspace(-1, 1, size * 6).view(size, 6)
                loop.ys[i % 16] = torch.arange(size) % 3
                loop.step(i)
        return loop.state()

    counts.check(f"{n} sizes", program)
    gc.collect()
    assert sum(type(thing) is Node for thing in gc.get_objects()) < 12 * kitsune.config.max_pending_ops


ROW = torch.zeros(48)
# What a batch of n goes through.
PATTERNS: dict[str, Callable[[Tensor], Any]] = {
    "activation": lambda x: nn.functional.gelu(x + ROW, approximate="tanh"),
    "softmax": lambda x: (x * 2).softmax(1),
    "layer norm": lambda x: nn.functional.layer_norm(x + 1, (48,), ROW, ROW),
    "sum over the batch": lambda x: (x * 2).sum(0),
    "mean of everything": lambda x: (x * 2).mean(),
    "loss": lambda x: nn.functional.cross_entropy(x, torch.zeros(len(x), dtype=torch.int64)),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_batches_of_ever_new_sizes_share_kernels(name: str, counts: Counts) -> None:
    """At most eight for each kernel of a plan, with all the tiles that they have."""
    every = many(41, 1)
    found: dict[int, set[tuple[str, Any]]] = {}
    for n in {*range(1, 1001, every), *(1 << k for k in range(10))}:
        kitsune.reset()
        plan = plan_of(lambda n=n: PATTERNS[name](torch.zeros(n, 48)), numerics="strict")
        programs = [program_of(launch) for launch in plan.launches if launch.kernels]
        for place, program in enumerate(programs):
            found.setdefault(place, set()).add((program.text, program.tile))
    assert found, "no kernel is planned at all"
    for place, kinds in found.items():
        counts.compare(f"kernel {place} of {name}: {len(kinds)}", True, len(kinds) <= 8)


def test_two_sizes_in_turns_are_both_followed(counts: Counts) -> None:
    def program(context: Callable[[], Any]) -> list[Tensor]:
        loop = Loop()
        with context():
            for i in range(12):
                k = i % 16
                loop.xs[k] = loop.xs[k][: 4 - i % 2].clone()
                loop.ys[k] = loop.ys[k][: 4 - i % 2].clone()
                loop.step(i)
        return loop.state()

    counts.check("two sizes", program, lazily)
    assert kitsune.counters()["backwards_followed"] >= 7
