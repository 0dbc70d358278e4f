"""The ways to run one training step that are compared, each built from the same model, loss, optimizer and batches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

import kitsune
from benchmarks.models import Batch, Workload

Read = Literal["every 20", "each"]
Forward = Callable[[Tensor, Tensor], Tensor]
Step = Callable[[Tensor, Tensor], Tensor]
# Before capture: the optimizer's state, library handles, and what a compiler has to compile.
GRAPH_WARM_UP = 3
# Seconds in which the tiles of all kernels are timed, or as many as can be.
TILES_S = 90.0


class NotAvailableError(Exception):
    """This column does not exist here, which is no fault of it; the text says why."""


@dataclass
class Program:
    """A column that is ready to run."""

    step: Step
    batches: list[Batch]
    context: contextlib.AbstractContextManager[Any] = field(default_factory=contextlib.nullcontext)
    # The next step writes into the loss that this one returned, so who keeps it has to copy it.
    reuses_loss: bool = False
    # Is everything there that is made in the background?
    is_ready: Callable[[], bool] = lambda: True
    # Has made what would be made beside later steps, before they are timed.
    settle: Callable[[], Any] = lambda: None
    # Is it decided how steps are run? The gate compares with eager in turns, of 24 steps each where they are short.
    is_decided: Callable[[], bool] = lambda: True
    # What is to be kept beside the times: whether it was what it is called.
    counts: Callable[[], dict[str, Any]] = dict


def make_step(workload: Workload, forward: Forward, read: Read) -> Step:
    """The training step as a user writes it; with `read` "each" it looks at the loss before it goes backward."""
    model_optimizer, device = workload.optimizer, workload.device.type

    def step(x: Tensor, y: Tensor) -> Tensor:
        model_optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=workload.precision == "amp"):
            loss = forward(x, y)
        if read == "each":
            loss.item()
        loss.backward()
        # Before the step, which ends a region: the next one would begin with it.
        kept = loss.detach()
        model_optimizer.step()
        return kept

    return step


def forward_of(workload: Workload) -> Forward:
    """Model and loss as one function of the batch: what a compiler gets."""

    def forward(x: Tensor, y: Tensor) -> Tensor:
        return workload.loss(workload.model, (x, y))

    return forward


class WholeStepGraph:
    """A step in one CUDA graph, made by hand as PyTorch's documentation has it. Its first calls warm up on a side stream; they
    and all later ones are real steps on the batch that they are given, which is copied to where the graph reads it."""

    def __init__(self, step: Step, optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            group["capturable"] = True
        self._step = step
        self._stream = torch.cuda.Stream()
        self._inputs: tuple[Tensor, ...] = ()
        self._n_warm = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._loss: Tensor | None = None

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        if not self._inputs:
            self._inputs = (x.clone(), y.clone())
        self._inputs[0].copy_(x)
        self._inputs[1].copy_(y)
        if self._n_warm < GRAPH_WARM_UP:
            self._n_warm += 1
            return self._warm_up()
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._loss = self._step(*self._inputs)
        self._graph.replay()
        assert self._loss is not None
        return self._loss

    def _warm_up(self) -> Tensor:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            loss = self._step(*self._inputs)
        torch.cuda.current_stream().wait_stream(self._stream)
        return loss


def _eager(workload: Workload, batches: list[Batch], read: Read) -> Program:
    return Program(make_step(workload, forward_of(workload), read), batches)


def _compiled(workload: Workload, batches: list[Batch], read: Read, mode: str | None = None) -> Program:
    forward = torch.compile(forward_of(workload), mode=mode)
    # CUDA-graph trees hand out memory of their graph.
    return Program(make_step(workload, forward, read), batches, reuses_loss=mode == "reduce-overhead")


def _reduce_overhead(workload: Workload, batches: list[Batch], read: Read) -> Program:
    _need_cuda(workload)
    return _compiled(workload, batches, read, mode="reduce-overhead")


def _graph(workload: Workload, batches: list[Batch], read: Read, compiled: bool = False) -> Program:
    _need_cuda(workload)
    if read == "each":
        raise NotAvailableError("one graph of a whole step cannot stop for Python to read the loss")
    forward = torch.compile(forward_of(workload)) if compiled else forward_of(workload)
    step = make_step(workload, forward, read)
    return Program(WholeStepGraph(step, workload.optimizer), batches, reuses_loss=True)


def _graph_channels_last(workload: Workload, batches: list[Batch], read: Read) -> Program:
    """The resident batches are channels-last too, as a loader that knows of it delivers them."""
    if batches[0][0].dim() != 4:
        raise NotAvailableError(f"channels-last needs inputs of 4 dimensions, and {workload.name} has {batches[0][0].dim()}")
    _need_cuda(workload)
    workload.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return _graph(workload, [(x.contiguous(memory_format=torch.channels_last), y) for x, y in batches], read)


def _compile_graph(workload: Workload, batches: list[Batch], read: Read) -> Program:
    return _graph(workload, batches, read, compiled=True)


def _kitsune(workload: Workload, batches: list[Batch], read: Read) -> Program:
    step = make_step(workload, forward_of(workload), read)
    return Program(
        step,
        batches,
        kitsune.accelerate(device=workload.device),
        is_ready=_kernels_are_there,
        settle=_tiles_are_timed,
        is_decided=_gate_has_decided,
        counts=_gate_counts,
    )


def _kitsune_fast(workload: Workload, batches: list[Batch], read: Read) -> Program:
    program = _kitsune(workload, batches, read)
    program.context = kitsune.accelerate(device=workload.device, numerics="fast")
    return program


def _kitsune_static(workload: Workload, batches: list[Batch], read: Read) -> Program:
    if read == "each":
        raise NotAvailableError("a step whose Python is skipped cannot stop for Python to read the loss")
    step = kitsune.accelerate(make_step(workload, forward_of(workload), read), static=True, device=workload.device)
    return Program(step, batches, is_ready=_kernels_are_there, settle=_tiles_are_timed, counts=_static_counts)


def _kernels_are_there() -> bool:
    return kitsune.wait_for_kernels(0)


def _tiles_are_timed() -> bool:
    return kitsune.wait_for_kernels(TILES_S, tuned=True)


def _gate_has_decided() -> bool:
    return not kitsune.config.gate or bool(kitsune.counters()["gate_decided"])


def _gate_counts() -> dict[str, Any]:
    counters = kitsune.counters()
    return {name: counters[name] for name in ("gate_left", "gate_decided", "graph_missed", "graph_refused")}


def _static_counts() -> dict[str, Any]:
    names = "static_skipped static_audits static_refused graph_missed graph_refused"
    counters = kitsune.counters()
    return {name: counters[name] for name in names.split()}


def _need_cuda(workload: Workload) -> None:
    if workload.device.type != "cuda":
        raise NotAvailableError("CUDA graphs need a CUDA device")


# In the order in which they are shown.
COLUMNS: dict[str, Callable[[Workload, list[Batch], Read], Program]] = {
    "eager": _eager,
    "graph": _graph,
    "graph-cl": _graph_channels_last,
    "compile": _compiled,
    "reduce-overhead": _reduce_overhead,
    "compile-graph": _compile_graph,
    "kitsune": _kitsune,
    "kitsune-fast": _kitsune_fast,
    "kitsune-static": _kitsune_static,
}
