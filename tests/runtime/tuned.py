"""Tuning without a device: tiles take as long as a test says, and start nothing but what their launch computes."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

import kitsune
from kitsune.backends import Backend
from kitsune.background import thread
from kitsune.codegen import Choices
from kitsune.config import config
from kitsune.ir import Launch, Tile
from tests.runtime.backends import lazily
from tests.runtime.checked import forget
from tests.runtime.repeated import Repeater, WalkInGraph
from tests.runtime.test_real_plans import Walk

SECONDS = 60.0
NEVER = Future[None]()
# Of a tile, by its kernel: seconds.
Takes = Callable[[str, Tile], float]


def second_is_fastest(kernel: str, tile: Tile) -> float:
    """The second candidate of kernels without reductions takes half as long as the first."""
    return 5e-6 if tile == Tile(512, 0, 4) else 1e-5


class Device:
    """What would be timed: `started` are the tiles in the order of their starts, with the kernels' names."""

    def __init__(self, takes: Takes) -> None:
        self.takes = takes
        self.started: list[tuple[str, Tile]] = []
        # Those that graphs were captured with.
        self.captured: list[tuple[str, Tile]] = []
        # Names of kernels whose programs are not there, and what comes of starts instead.
        self.held: set[str] = set()
        self.broken: dict[tuple[str, Tile], Exception] = {}
        # Is the device through with what was timed?
        self.is_through = True
        self.errors: list[Exception] = []

    def timer(self, runs: list[Callable[[], None]]) -> Callable[[], list[float] | None]:
        taken = []
        for run in runs:
            run()
            taken.append(self.takes(*self.started[-1]))
        return lambda: taken if self.is_through else None


class Tiled(Walk):
    """A launch with a tile. On memory between two replays it may compute what it wants, but not elsewhere."""

    def __init__(self, launch: Launch, device: Device) -> None:
        super().__init__(launch)
        self.launch, self.device = launch, device

    def start(self, address: Any, scalars: list[float], stream: int) -> None:
        if self.launch.kernels and self.launch.tile is not None:
            name = (self.launch.kernels[0].name, self.launch.tile)
            if name in self.device.broken:
                raise self.device.broken[name]
            self.device.started.append(name)
        super().start(address, scalars, stream)


def bench(device: Device, folder: Path) -> Backend:
    """A backend with tiles that are timed."""

    def warm(launch: Launch, made: Tiled) -> list[Future[Any]]:
        there: Future[None] = Future()
        there.set_result(None)
        return [NEVER if launch.name in device.held else there]

    def in_graph(launch: Launch, usable: Tiled, table: Any) -> WalkInGraph:
        if launch.kernels and launch.tile is not None:
            device.captured.append((launch.kernels[0].name, launch.tile))
        return WalkInGraph(launch, table)

    choices = Choices(folder, "a device")
    return Backend("sm_90", lambda launch: Tiled(launch, device), in_graph, warm, choices=choices, timer=device.timer)


@contextlib.contextmanager
def tuned(folder: Path, takes: Takes = second_is_fastest, after: int = 2, **knobs: Any) -> Iterator[Device]:
    """New pipelines on the CPU time their tiles, of small kernels as well, after so many replays and without pauses."""
    device = Device(takes)
    with pytest.MonkeyPatch.context() as patch, config.patch(**{"compile_workers": 1, "tuning": "on", **knobs}):
        patch.setattr("kitsune.running.backend_of", lambda _: bench(device, folder))
        patch.setattr("kitsune.running.recorder_of", lambda _: Repeater())
        patch.setattr("kitsune.codegen.choices.WORTH_BYTES", 0)
        patch.setattr("kitsune.tuning.AFTER", after)
        patch.setattr("kitsune.tuning.SHARE", 1e9)
        forget()
        yield device
    forget()


def idle() -> None:
    """Wait until the background thread has done what it was asked for."""
    done = threading.Event()
    thread.submit(done.set, rank=9)
    assert done.wait(SECONDS)


X = torch.arange(2048.0).view(128, 16) / 700
WEIGHTS = [torch.linspace(-1, 1, 256).view(16, 16) * (k + 1) for k in range(8)]


def products() -> torch.Tensor:
    """Two kernels, and enough memory alive beside them for either to be tried there."""
    a, b, c, d, e, *rest = (X @ weight for weight in WEIGHTS)
    joined = (a.relu() * b - c) * 0.5
    found = (joined @ WEIGHTS[0] + d).relu() * e
    for other in rest:
        found = found @ other[:16]
    return found


def steps(n: int, program: Callable[[], torch.Tensor] = products, during: Callable[[], Any] = lambda: None) -> list[torch.Tensor]:
    """What the program returns, so many times, with everything done in between that is done in the background. Each time it is
    run after `during`."""
    found = []
    for _ in range(n):
        during()
        with lazily():
            found.append(program())
        kitsune.wait_for_kernels(SECONDS)
        idle()
    return found
