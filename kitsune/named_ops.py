"""Operators by name: what `FusionEngine.fuse(['linear', 'relu'])` records."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from kitsune.engine_options import EngineOptions
from kitsune.ir import Graph
from kitsune.pipeline import Pipeline, listeners
from kitsune.session import Accelerate

N = 64
SHAPE = (N, N)
APART = EngineOptions(fuse=False, graphs=False, n_streams=1)
TRIES = 20
Call = Callable[[Tensor, "Operands"], Tensor]


class Operands:
    """What operators take beside the tensor that the one before has made."""

    def __init__(self) -> None:
        self.other, self.weight = torch.ones(SHAPE), torch.ones(SHAPE)
        self.bias, self.scale = torch.ones(N), torch.ones(N)
        self.mask = torch.ones(SHAPE, dtype=torch.bool)


def _binary(name: str) -> Call:
    return lambda x, o: getattr(torch, name)(x, o.other)


def _row(name: str) -> Call:
    return lambda x, o: getattr(torch, name)(x, dim=-1, keepdim=True)


def _unary(name: str) -> Call:
    return lambda x, o: getattr(F if hasattr(F, name) and not hasattr(torch, name) else torch, name)(x)


def _whole(x: Tensor) -> Tensor:
    """What a reduction has left, as wide as before."""
    return x.expand(SHAPE)


CALLS: dict[str, Call] = {
    **{name: _binary(name) for name in "add sub mul div maximum minimum pow".split()},
    **{name: _row(name) for name in "mean sum amax amin var std logsumexp".split()},
    "max": _row("amax"),
    "min": _row("amin"),
    "norm": lambda x, o: torch.linalg.vector_norm(x, dim=-1, keepdim=True),
    "bias": lambda x, o: x + o.bias,
    "scale": lambda x, o: x * o.scale,
    "affine": lambda x, o: torch.addcmul(o.bias, x, o.scale),
    "clamp": lambda x, o: x.clamp(-1.0, 1.0),
    "where": lambda x, o: torch.where(o.mask, x, o.other),
    # As on a GPU.
    "dropout": lambda x, o: torch.native_dropout(x, 0.5, True)[0],
    "softmax": lambda x, o: torch.softmax(x, -1),
    "log_softmax": lambda x, o: torch.log_softmax(x, -1),
    "layer_norm": lambda x, o: F.layer_norm(_whole(x), (N,), o.scale, o.bias),
    "rms_norm": lambda x, o: F.rms_norm(_whole(x), (N,), o.scale),
    "group_norm": lambda x, o: F.group_norm(_whole(x), 1, o.scale, o.bias),
    "batch_norm": lambda x, o: F.batch_norm(_whole(x), None, None, o.scale, o.bias, training=True),
    "linear": lambda x, o: F.linear(_whole(x), o.weight, o.bias),
    **dict.fromkeys(("matmul", "mm"), lambda x, o: _whole(x) @ o.weight),
    "addmm": lambda x, o: torch.addmm(o.bias, _whole(x), o.weight),
    "bmm": lambda x, o: torch.bmm(_whole(x)[None], o.weight[None])[0],
    "baddbmm": lambda x, o: torch.baddbmm(o.other[None], _whole(x)[None], o.weight[None])[0],
    "attention": lambda x, o: F.scaled_dot_product_attention(_whole(x)[None, None], o.other[None, None], o.other[None, None])[
        0, 0
    ],
}


def record(names: Sequence[str]) -> tuple[Graph, list[int]]:
    """The graph of the operators, each on what the one before has made, and for each op the number of its name."""
    # Of a pipeline of its own: what the program records at the moment goes to another one.
    context = Accelerate(warmup=1, device="cpu", options=APART)
    pipeline = context.pipeline()
    if pipeline is None:
        raise RuntimeError("Operators cannot be recorded while Kitsune is off: unset KITSUNE=0, or set kitsune.config.enabled.")
    operands, x = Operands(), torch.ones(SHAPE)
    # Observed first: from the second time on every operator is known, and the region has its results. More often only where
    # other threads of the program have ended it.
    for _ in range(TRIES):
        graphs: list[Graph] = []
        listeners.append(graphs.append)
        try:
            with torch.no_grad(), context:
                kept, bounds = _go_through(names, operands, x, pipeline)
        finally:
            listeners.remove(graphs.append)
        del kept
        whole = [graph for graph in graphs if graph.outputs and len(graph.ops) == bounds[-1][1]]
        if whole:
            return whole[-1], [step for step, (start, end) in enumerate(bounds) for _ in range(start, end)]
    raise RuntimeError(f"{list(names)} could not be recorded in one piece, {TRIES} times: fuse them while no other thread runs.")


def _go_through(names: Sequence[str], operands: Operands, x: Tensor, pipeline: Pipeline) -> tuple[Tensor, list[tuple[int, int]]]:
    bounds = []
    for name in names:
        start = pipeline.recorder.region.node.depth
        x = CALLS.get(name, _unary(name))(x, operands)
        bounds.append((start, pipeline.recorder.region.node.depth))
    return x, bounds
