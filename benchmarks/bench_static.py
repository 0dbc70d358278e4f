"""What a call of a static function costs on the host once its Python is skipped, and where an unmodified loop is beside it.

    python -m benchmarks.bench_static [--device cpu] [--layers 3,25,100] [--calls 2000] [--json FILE]

The step trains an MLP of so many linear layers of width 16 under bf16 autocast with the fused AdamW: two parameters and six
pieces of optimizer state a layer. `held` keeps the loss until the next call has returned, as loops do. On a CPU nothing takes
the place of the graph's work: what is timed is everything but the launch. On a GPU the device is waited for between two calls.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kitsune
import kitsune.running
from benchmarks.environment import keep
from kitsune.codegen import PAGE_PROGRAMS
from kitsune.runtime import PageReader
from kitsune.runtime.cuda_graph import Work
from kitsune.runtime.page_ring import PageRing

WIDTH, BATCH = 16, 64
Step = Callable[[Tensor, Tensor], Tensor]


class NoWork:
    """A graph that does nothing when it is replayed."""

    def __init__(self, outputs: list[Tensor], numbers: list[Any]) -> None:
        self.outputs, self.numbers, self.nbytes = outputs, numbers, 0

    def replay(self) -> None:
        """It costs no time, and gives no numbers."""

    def sent(self, k: int) -> Any:
        """The number that was read early when it was recorded."""
        return self.numbers[k]

    def destroy(self) -> None:
        """There is nothing but the outputs."""
        self.outputs = []


class NoGraphs:
    """Records by running the work once and undoing what it wrote."""

    def follow_stream(self) -> bool:
        """There are no streams."""
        return True

    def record(self, work: Work, inputs: Sequence[Tensor], n_sent: int = 0, nbytes: int = 0) -> NoWork:
        """The outputs are those of this one run for ever."""
        before = [t.detach().clone() for t in inputs]
        numbers: list[Any] = []
        outputs = work(inputs, lambda tensors: numbers.extend(t.item() for t in tensors))
        for t, content in zip(inputs, before, strict=True):
            t.detach().copy_(content)
        return NoWork(outputs, numbers)


class NoKernels:
    """What would read pages, if anything was replayed."""

    block = 1 << 20

    def compile(self, program: Any, target: torch.device, divisibility: int, wide: bool) -> "NoKernels":
        """One for all."""
        return self

    def launch(self, grid: int, args: Sequence[Any], stream: int) -> None:
        """Nothing is read."""

    def load(self) -> None:
        """There is nothing to load."""


def without_a_device() -> None:
    """Have regions captured as graphs that do nothing, told of their batches by pages (KITSUNE_PAGES=0: by copies)."""
    kitsune.running.recorder_of = lambda device: NoGraphs()
    reader = PageReader(PAGE_PROGRAMS, NoKernels(), torch.device("cpu"))
    kitsune.running.reader_of = lambda backend: reader if kitsune.config.pages else None
    # Nobody would say that a page was read.
    PageRing._wait = lambda self: None  # type: ignore[method-assign]


def training(layers: int, device: torch.device) -> tuple[Step, Iterator[tuple[Tensor, Tensor]]]:
    """The step, and batches that take turns."""
    torch.manual_seed(0)
    inner = [layer for _ in range(layers - 1) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    model = nn.Sequential(*inner, nn.Linear(WIDTH, 10)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        kept = loss.detach()
        optimizer.step()
        return kept

    batches = [(torch.randn(BATCH, WIDTH), torch.randn(BATCH, 10).softmax(-1)) for _ in range(4)]
    return step, itertools.cycle([(x.to(device), y.to(device)) for x, y in batches])


def micros(step: Step, batches: Iterator[tuple[Tensor, Tensor]], calls: int, hold: bool) -> list[float]:
    """Microseconds of each call."""
    loss, taken = None, []
    for _ in range(calls):
        x, y = next(batches)
        if not hold:
            loss = None
        if x.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        loss = step(x, y)
        taken.append((time.perf_counter() - start) * 1e6)
    assert loss is not None
    return taken


def measure(layers: int, calls: int, device: torch.device) -> list[dict[str, Any]]:
    """Rows of one size: static and unmodified, with the loss held and not."""
    rows = []
    for way in ("static", "loop"):
        kitsune.reset()
        step, batches = training(layers, device)
        n = calls if way == "static" else calls // 5
        if way == "static":
            step = kitsune.accelerate(step, static=True, device=device, audit=0)
        context = kitsune.accelerate(device=device) if way == "loop" else kitsune.disable()
        with context, kitsune.config.patch(gate=False):
            micros(step, batches, 60, True)
            kitsune.wait_for_kernels(60)
            micros(step, batches, 20, True)
            before = kitsune.counters()["replayed"]
            for hold in (False, True):
                taken = micros(step, batches, n, hold)
                low, middle, high = statistics.quantiles(taken, n=4)
                row = {"way": way, "layers": layers, "parameters": 2 * layers, "held": hold}
                rows.append(row | {"us": round(middle, 1), "quartiles_us": [round(low, 1), round(high, 1)]})
        if kitsune.counters()["replayed"] - before < 2 * n - 2:
            raise RuntimeError(f"{way}, {layers} layers: not every step was replayed: {kitsune.counters()}")
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", default="3,25,100")
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--json")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.set_num_threads(1)
    if device.type == "cpu":
        without_a_device()
    rows = []
    print(f"{'':8s}{'parameters':>12s}{'held':>7s}{'us':>9s}   quartiles")
    for layers in map(int, options.layers.split(",")):
        for row in measure(layers, options.calls, device):
            rows.append(row)
            low, high = row["quartiles_us"]
            print(f"{row['way']:8s}{row['parameters']:12d}{row['held']!s:>7s}{row['us']:9.1f}   {low:.1f} to {high:.1f}")
    print(f"kept in {keep('static', rows, device, options.json)}")


if __name__ == "__main__":
    main()
