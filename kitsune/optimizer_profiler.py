"""`KitsuneOptimizer.profiler`: what was measured of an optimizer's steps, as plain numbers."""

from __future__ import annotations

import weakref
from statistics import fmean
from typing import Any

import torch

from kitsune.contexts import everyone
from kitsune.optimizer_options import devices_of
from kitsune.pipeline import tally
from kitsune.profiler import StepMeter, fusion_of, graph_of, speed, statistics_of

# Batches whose sizes are averaged.
MAX_BATCHES = 256


class OptimizerProfiler:
    """Takes the time of each step of one optimizer; `get_metrics()` has what came of it."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = weakref.ref(optimizer)
        device = next((d for d in devices_of(optimizer.base_optimizer) if d.type == "cuda"), torch.device("cpu"))
        self._meter = StepMeter(tally, device)
        # How many samples went into each of the last steps, by the first tensor that the model was given.
        self._samples: list[int] = []
        self._n_samples = 0

    def forward_begins(self, args: Any) -> None:
        """The model is given a batch, maybe one of several in a step."""
        first = next((a for a in args if isinstance(a, torch.Tensor) and a.dim()), None)
        self._n_samples += 0 if first is None else len(first)

    def step_ended(self) -> None:
        """The optimizer has stepped."""
        self._meter.step_ended()
        self._samples = [*self._samples, self._n_samples][-MAX_BATCHES:]
        self._n_samples = 0

    def get_metrics(self) -> dict[str, Any]:
        """Numbers, texts and None for what was not measured, ready for JSON. Waits for the device."""
        optimizer = self._optimizer()
        if optimizer is None:
            raise RuntimeError("The optimizer of this profiler is gone: keep it until its metrics are read.")
        return metrics_of(optimizer)

    def seconds(self) -> dict[str, list[float]]:
        """The time of each step by what was done with it."""
        return self._meter.seconds()

    def samples_per_step(self) -> float | None:
        """The mean of the last batches; None if none was seen."""
        seen = [n for n in self._samples if n]
        return fmean(seen) if seen else None


def metrics_of(optimizer: Any) -> dict[str, Any]:
    """What is known of an optimizer's steps. Counts of plans and graphs are those of the process since `kitsune.reset()`."""
    profiler = optimizer.profiler
    seconds = {} if profiler is None else profiler.seconds()
    found = speed(seconds)
    per_second = 1e3 / found["step_ms"] if found["step_ms"] else None
    samples = None if profiler is None else profiler.samples_per_step()
    every = [one for kind in seconds.values() for one in kind]
    timing = {f"step_{kind}": statistics_of(times) for kind, times in seconds.items()}
    return {
        "steps": optimizer._n_steps,
        "timing": {**({"step": statistics_of(every)} if every else {}), **timing},
        "speed": found,
        "memory": _memory(optimizer),
        "throughput": {
            "iterations_per_sec": per_second,
            "samples_per_sec": per_second * samples if per_second and samples else None,
        },
        "streams": {
            "allowed": optimizer.scheduler.num_streams,
            "used": optimizer.scheduler.streams_used,
            # Of several streams; with one there is nothing to overlap.
            "efficiency": None,
        },
        "fusion": {"enabled": optimizer._options.enable_fusion, **fusion_of(tally)},
        "amp": _amp(optimizer),
        "graph": {"enabled": optimizer._options.capture_graph, **graph_of(tally)},
    }


def _memory(optimizer: Any) -> dict[str, Any]:
    devices = [d for d in devices_of(optimizer.base_optimizer) if d.type == "cuda"]
    pools = [one.runner.pool.statistics for one in list(everyone) if one.runner.pool is not None]
    hits, misses = sum(p.hits for p in pools), sum(p.misses for p in pools)
    return {
        "peak_allocated": sum(map(torch.cuda.max_memory_allocated, devices)) if devices else None,
        "peak_reserved": sum(map(torch.cuda.max_memory_reserved, devices)) if devices else None,
        "pool_size": optimizer._options.memory_pool_size,
        "pool_hit_rate": hits / (hits + misses) if hits + misses else None,
    }


def _amp(optimizer: Any) -> dict[str, Any]:
    amp = optimizer._amp
    if amp is None:
        return {"enabled": False, "dtype": None, "scale": None, "skipped": None}
    kinds = {str(amp.dtype(device)).removeprefix("torch.") for device in devices_of(optimizer.base_optimizer)}
    scaled = "float16" in kinds
    return {
        "enabled": True,
        "dtype": ", ".join(sorted(kinds)),
        "scale": amp.scale.state_dict()["scale"] if scaled else None,
        "skipped": amp.scale.skipped() if scaled else None,
    }
