"""The stages, put together: dispatch -> lazy -> (planning to come) -> runtime -> profiler."""

import os
import sys
from typing import Any

import torch

from kitsune.config import config
from kitsune.dispatch import RecordMode, below_autograd, describe, infer, keep_out_of_dynamo
from kitsune.ir import Barrier, Graph, Site, verify
from kitsune.lazy import LazyTensor, Recorder
from kitsune.profiler import Tally
from kitsune.runtime import Schedule, prepare, replay

MAX_SCHEDULES = 1024
tally = Tally()
# Hear of each region as it closes; `session.trace_regions` adds itself here.
listeners: list[Any] = []

keep_out_of_dynamo(Recorder.record.__code__)
keep_out_of_dynamo(LazyTensor.__torch_dispatch__.__func__.__code__)  # type: ignore[attr-defined]


class Listener(RecordMode, Recorder):
    """The dispatch mode and the recorder in one object: calling from one to the other would cost 0.1 us per op."""

    __torch_dispatch__ = Recorder.record

    def __init__(self, **stages: Any) -> None:
        RecordMode.__init__(self)
        Recorder.__init__(self, **stages)


class Pipeline:
    """One per accelerating thread: a listener that intercepts and records, and an executor that runs what is flushed."""

    def __init__(self, device: torch.device, warmup: int) -> None:
        self.schedules: dict[Graph, Schedule] = {}
        # The mode could not be taken off the stack when its context closed; see RecordMode.leave.
        self.left_behind = False
        self.recorder = Listener(
            device=device,
            warmup=warmup,
            max_ops=config.max_pending_ops,
            max_bytes=config.max_pending_bytes or _half_of_memory(device),
            describe=describe,
            infer=infer,
            below_autograd=below_autograd,
            run=self.run,
            tally=tally,
            on_close=close,
        )

    def run(self, graph: Graph, values: list[Any], scalars: list[float]) -> None:
        """Run a flushed region: `values` has the inputs by number and receives the outputs."""
        schedule = self.schedules.get(graph)
        if schedule is None:
            if len(self.schedules) > MAX_SCHEDULES:
                self.schedules.clear()
            schedule = self.schedules[graph] = prepare(graph)
        tally.executed += len(schedule.instructions)
        tally.skipped += schedule.n_dead
        with below_autograd(), torch._C._DisableTorchDispatch():
            replay(schedule, values, scalars)

    def forget(self) -> None:
        """Drop every region seen so far, and its schedule."""
        self.recorder.flush(Barrier.FLUSH)
        self.recorder.forget()
        self.schedules.clear()


def close(graph: Graph, cause: Barrier, site: Site | None) -> None:
    """A region ended: check it, show it, tell who listens."""
    if config.verify:
        verify(graph)
    if config.debug:
        print(f"kitsune: {len(graph.ops)} operators, {cause.name} at {site}", file=sys.stderr)
    for listener in listeners:
        listener(graph)


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device to record for: by default the current CUDA device or, without one, the CPU."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    resolved = torch.device(device)
    if resolved.type == "cpu":
        return torch.device("cpu")
    if resolved.type != "cuda":
        raise ValueError(f"Kitsune records for device 'cpu' or 'cuda', not {str(device)!r}.")
    if not torch.cuda.is_available():
        raise RuntimeError(
            f"device={str(device)!r} was asked for, but torch finds no CUDA device. Use device='cpu' or leave it out."
        )
    index = torch.cuda.current_device() if resolved.index is None else resolved.index
    if index >= torch.cuda.device_count():
        raise RuntimeError(f"device={str(device)!r} was asked for, but there are {torch.cuda.device_count()} CUDA devices.")
    return torch.device("cuda", index)


def _half_of_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 2
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
