"""Worker processes, forked and spawned, while a context is open: they compute as in eager, and may open one themselves."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import kitsune
from tests.chaos.counting import NO_BACKWARD_IN_FORKS, Counts, Loop, lazily, many

# Python 3.12 warns of forking with threads, of which torch has some.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


class Rows(Dataset):
    """Each row is computed where it is fetched."""

    def __init__(self, base: torch.Tensor) -> None:
        self.base = base

    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> torch.Tensor:
        row = self.base[i % 4] * 1.5
        return row.add_(0.5).sin()


def in_a_fork(function: Callable[[], Any]) -> Any:
    """What the function returns in a forked child."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            # As a loader's workers do: the threads of OpenMP are not there after a fork.
            torch.set_num_threads(1)
            result = function()
        except BaseException as error:
            result = f"{type(error).__name__}: {error}"
        with os.fdopen(write, "wb") as file:
            pickle.dump(result, file)
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as file:
        result = pickle.load(file)
    os.waitpid(child, 0)
    return result


WAYS = [(0, None), (2, "fork"), *([(2, "spawn"), (2, "forkserver"), (4, "fork"), (4, "spawn")] if many(0, 1) else [])]


@pytest.mark.parametrize(("workers", "way"), WAYS)
def test_a_loader_inside_of_a_context(workers: int, way: str | None, counts: Counts) -> None:
    def program(context: Callable[[], Any]) -> list[torch.Tensor]:
        loop = Loop()
        with context():
            # What the workers read is pending when they are started.
            rows = Rows(loop.xs[0] * 2)
            for turn in range(2):
                loader = DataLoader(rows, batch_size=4, num_workers=workers, multiprocessing_context=way)
                for i, batch in enumerate(loader):
                    loop.xs[i] = batch
                    loop.step(i + turn)
        return loop.state()

    counts.check(f"{workers} {way}", program)
    # What workers send lies in memory that another process may write: on a CPU it is read at once.
    assert kitsune.counters()["backwards_followed" if workers == 0 else "observed"] > 4


def train() -> list[list[float]]:
    loop = Loop()
    for i in range(6):
        loop.step(i)
    return [t.tolist() for t in loop.state()]


def accelerated() -> tuple[list[list[float]], bool]:
    kitsune.reset()
    with lazily():
        result = train()
    return result, kitsune.counters()["backwards_followed"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason=NO_BACKWARD_IN_FORKS)
@pytest.mark.parametrize("inside", [False, True], ids=["after a context", "inside of a context"])
def test_a_forked_child_may_open_a_context_of_its_own(inside: bool, counts: Counts) -> None:
    # With as many threads as it has, for the last bits.
    here, there = train(), in_a_fork(train)
    with lazily():
        counts.compare("parent", here, train())
        if inside:
            counts.compare("child, in what it inherits", there, in_a_fork(train))
            counts.compare("child", (there, True), in_a_fork(accelerated))
            counts.compare("grandchild", (there, True), in_a_fork(lambda: in_a_fork(accelerated)))
    if not inside:
        counts.compare("child", (there, True), in_a_fork(accelerated))
    counts.compare("parent afterwards", (here, True), accelerated())
