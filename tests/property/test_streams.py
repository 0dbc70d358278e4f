"""One stream of operators: observing, recording and a plain dispatch mode see the same ones, in regions split alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kitsune
from kitsune.session import trace_regions
from tests.property.stream_programs import PROGRAMS

STEPS = 3
# (name of the operator, shapes of what it makes or rewrites), region by region
Stream = list[list[tuple[str, tuple[tuple[int, ...], ...]]]]


def regions(graphs: list[Any]) -> Stream:
    found = [[(str(op.target), tuple(tuple(v.type.shape) for v in op.outputs)) for op in graph.ops] for graph in graphs]
    # What was pending when a region left the known paths is run, and the region goes on: its first part is told twice.
    return [a for a, b in zip(found, [*found[1:], []], strict=True) if b[: len(a)] != a]


def traced(name: str, warmup: int, passes: int, forget: bool = False) -> list[Stream]:
    """The regions of each step, in the last of some passes of the same program from its beginning."""
    kitsune.reset()
    for _ in range(passes):
        torch.manual_seed(7)
        step = PROGRAMS[name]()
        streams = []
        for _ in range(STEPS):
            if forget:
                kitsune.reset()
            with trace_regions() as graphs, kitsune.accelerate(warmup=warmup, device="cpu"):
                step()
            streams.append(regions(graphs))
    return streams


def observed(name: str) -> list[Stream]:
    streams = traced(name, warmup=1, passes=1, forget=True)
    assert kitsune.counters()["observed"] > 0
    return streams


def recorded(name: str, warmup: int) -> list[Stream]:
    streams = traced(name, warmup, passes=warmup + 2)
    assert kitsune.counters()["recorded"] > 0
    return streams


class Logger(TorchDispatchMode):
    """Sees what Kitsune should see, and changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not is_passed_through(func, args):
            self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


def is_passed_through(func: Any, args: Any) -> bool:
    """Not part of any region: what is read at once, profiler ranges, and an optimizer's step counts on the CPU."""
    if func.namespace != "aten" or func is torch.ops.aten._local_scalar_dense.default:
        return True
    if func is torch.ops.aten._foreach_add_.Tensor:
        return all(count.dim() == 0 for count in args[0])
    return func is torch.ops.aten.add_.Tensor and args[0].dim() == 0


def logged(name: str) -> list[list[str]]:
    """The operators of each step in eager."""
    torch.manual_seed(7)
    step = PROGRAMS[name]()
    steps = []
    for _ in range(STEPS):
        with Logger() as logger, replayed_views():
            step()
        steps.append(logger.ops)
    return steps


@contextmanager
def replayed_views() -> Iterator[None]:
    before = torch._C._is_view_replay_enabled()
    torch._C._set_view_replay_enabled(True)
    yield
    torch._C._set_view_replay_enabled(before)


def names(stream: Stream) -> list[str]:
    """The operators, less optimizers' step counts: 0-dim tensors on the CPU, which are counted up at once or not."""
    return [name for region in stream for name, shapes in region if (name, shapes) != ("aten.add_.Tensor", ((),))]


@pytest.mark.parametrize("warmup", [0, 1])
@pytest.mark.parametrize("name", PROGRAMS)
def test_observing_and_recording_see_the_same_stream(name: str, warmup: int) -> None:
    assert recorded(name, warmup) == observed(name)


@pytest.mark.parametrize("name", PROGRAMS)
def test_kitsune_sees_what_a_plain_dispatch_mode_sees(name: str) -> None:
    for seen, expected in zip([names(stream) for stream in observed(name)], logged(name), strict=True):
        rest = iter(seen)
        awaited = next(rest, None)
        left_out = []
        for op in expected:
            if op == awaited:
                awaited = next(rest, None)
            else:
                left_out.append(op)
        assert awaited is None
        # A view of a tensor that only comes in is made at once, and so is an optimizer's new state: no part of the region.
        assert [op for op in left_out if op.split(".")[1] not in VIEWS | STATE] == []


STATE = {"zeros_like", "zeros"}
VIEWS = {"t", "view", "select", "slice", "unbind", "transpose", "detach", "unsqueeze", "expand", "lift_fresh", "split", "permute"}
