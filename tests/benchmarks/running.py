"""A training loop that is timed, iteration by iteration: plain PyTorch, or with the optimizer that is given."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, repeat
from statistics import fmean, median, pstdev

import torch
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]
WHOLE = ("batch_size", "num_iterations", "num_classes", "num_samples")


@dataclass(frozen=True)
class BenchmarkConfig:
    """How long, on what, and with which random data a model is trained."""

    batch_size: int = 64
    num_iterations: int = 100
    warmup_iterations: int = 10
    device: str = "cuda"
    dtype: torch.dtype = torch.float32
    input_size: tuple[int, ...] = (1, 28, 28)
    num_classes: int = 10
    num_samples: int = 1000

    def __post_init__(self) -> None:
        for name in WHOLE:
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}={value!r} is not possible: {name} accepts a whole number of 1 or more.")
        if type(self.warmup_iterations) is not int or self.warmup_iterations < 0:
            raise ValueError(f"warmup_iterations={self.warmup_iterations!r} is not possible: it is a whole number of 0 or more.")
        if self.num_samples < self.batch_size:
            raise ValueError(f"num_samples={self.num_samples} is less than one batch of {self.batch_size}.")


@dataclass(frozen=True)
class BenchmarkResult:
    """What was measured: the milliseconds of each iteration, and the loss at its end."""

    model: str
    config: BenchmarkConfig
    device: str
    times_ms: tuple[float, ...]
    losses: tuple[float, ...]
    # Bytes; None where torch does not count them.
    peak_memory: int | None = None
    note: str = field(default="")

    @property
    def mean_ms(self) -> float:
        """Milliseconds of an iteration."""
        return fmean(self.times_ms)

    @property
    def iterations_per_sec(self) -> float:
        """Iterations in a second."""
        return 1e3 / self.mean_ms

    @property
    def samples_per_sec(self) -> float:
        """Samples in a second."""
        return self.config.batch_size * self.iterations_per_sec

    def summary(self) -> str:
        """A few lines for people."""
        memory = "n/a" if self.peak_memory is None else f"{self.peak_memory / 2**20:.1f} MiB"
        lines = [
            f"{self.model} on {self.device}, batch {self.config.batch_size}, {len(self.times_ms)} iterations",
            f"  time per iteration   {self.mean_ms:.3f} ms (median {median(self.times_ms):.3f}, std {pstdev(self.times_ms):.3f}, "
            f"min {min(self.times_ms):.3f}, max {max(self.times_ms):.3f})",
            f"  throughput           {self.iterations_per_sec:.1f} iterations/s, {self.samples_per_sec:.0f} samples/s",
            f"  loss                 {self.losses[0]:.4f} -> {self.losses[-1]:.4f}",
            f"  peak memory          {memory}",
        ]
        return "\n".join([*lines, *([f"  note                 {self.note}"] if self.note else [])])


def run_baseline_benchmark(
    model: nn.Module,
    config: BenchmarkConfig | None = None,
    optimizer_fn: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
    loss_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
    data: Iterable[Batch] | None = None,
) -> BenchmarkResult:
    """Train the model and time it: with Adam and cross entropy on random data, or with what is given.

    `optimizer_fn` is given the parameters: `lambda p: KitsuneOptimizer(torch.optim.Adam, p)` measures Kitsune in the same loop.
    Without the device that the config names, the CPU is used, and the result says so.
    """
    config = config or BenchmarkConfig()
    device, note = _device(config)
    model = model.to(device=device, dtype=config.dtype).train()
    optimizer = (optimizer_fn or torch.optim.Adam)(model.parameters())
    loss_fn = loss_fn or nn.functional.cross_entropy
    batches = _batches(config, device, data)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times, losses = [], []
    for k in range(config.warmup_iterations + config.num_iterations):
        x, y = next(batches)
        start = _now(device)
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        optimizer.step()
        elapsed = _now(device) - start
        if k >= config.warmup_iterations:
            times.append(1e3 * elapsed)
            losses.append(float(loss.detach()))
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return BenchmarkResult(type(model).__name__, config, str(device), tuple(times), tuple(losses), peak, note)


def _device(config: BenchmarkConfig) -> tuple[torch.device, str]:
    device = torch.device(config.device)
    if device.type != "cuda" or torch.cuda.is_available():
        return device, ""
    note = f"there is no CUDA device, so {config.device!r} became 'cpu'"
    warnings.warn(note, stacklevel=3)
    return torch.device("cpu"), note


def _batches(config: BenchmarkConfig, device: torch.device, data: Iterable[Batch] | None) -> Iterator[Batch]:
    if data is None:
        generator = torch.Generator().manual_seed(0)
        xs = torch.randn(config.num_samples, *config.input_size, generator=generator, dtype=config.dtype)
        ys = torch.randint(config.num_classes, (config.num_samples,), generator=generator)
        n = config.num_samples // config.batch_size * config.batch_size
        data = list(zip(xs[:n].split(config.batch_size), ys[:n].split(config.batch_size), strict=True))
    found = [(x.to(device), y.to(device)) for x, y in data]
    if not found:
        raise ValueError("data has no batch: give an iterable of (inputs, targets).")
    return chain.from_iterable(repeat(found))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
