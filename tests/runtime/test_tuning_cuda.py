"""Tiles by measurement on a GPU: what is timed is right, takes no memory, and changes no bit that it must not change."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import kitsune
from kitsune.backends import choices_in, program_of
from kitsune.codegen import Compiler, candidates, keeps_bits
from kitsune.config import config
from kitsune.ir import Launch
from kitsune.runtime.kernel_launch import PreparedLaunch
from kitsune.runtime.timing import in_turn
from kitsune.runtime.trials import ROUNDS, Trial
from tests.plan.recorded import plan_of
from tests.runtime.checked import forget
from tests.runtime.repeated import counts

pytestmark = pytest.mark.gpu
SECONDS = 120.0
# Whichever is the current one.
DEVICE = torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)


@pytest.fixture(autouse=True)
def tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels of any size are tried, after 4 replays and without pauses; nothing is known of them."""
    monkeypatch.setattr("kitsune.codegen.choices.WORTH_BYTES", 0)
    monkeypatch.setattr("kitsune.tuning.AFTER", 4)
    monkeypatch.setattr("kitsune.tuning.SHARE", 1e9)
    forget()
    choices_in.cache_clear()
    with config.patch(cache_dir=str(tmp_path), compile_workers=4, tuning="on", numerics="strict"):
        yield
    assert kitsune.wait_for_kernels(SECONDS)
    forget()


class Model(nn.Module):
    """Kernels over elements, rows and columns."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.middle = nn.Linear(256, 512), nn.LayerNorm(512), nn.Linear(512, 512, bias=False)
        self.last = nn.Linear(512, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.norm(torch.nn.functional.gelu(self.first(x)))
        # Forward and backward, a kernel over elements between two products.
        out: torch.Tensor = self.last((self.middle(hidden) * 1.5).tanh())
        return out


def train(context: Any, steps: int, until: Callable[[], bool] = lambda: False) -> list[torch.Tensor]:
    """Losses and parameters after so many steps, or when it is enough."""
    torch.manual_seed(0)
    model = Model().cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    x, target = torch.randn(4096, 256, device="cuda"), torch.randint(0, 64, (4096,), device="cuda")
    losses = []
    with context:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), target)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            if until():
                break
    return [*losses, *(p.detach() for p in model.parameters())]


def all_tried() -> bool:
    """Also gives the workers time."""
    time.sleep(2e-3)
    tried, _, untried = counts("tiles_tried", "tiles_changed", "tiles_untried")
    return tried > 0 and untried == 0


def test_kernels_are_tried_beside_a_training_and_named_in_explain() -> None:
    train(kitsune.accelerate(), 4)
    assert kitsune.wait_for_kernels(SECONDS)
    train(kitsune.accelerate(), 6000, all_tried)
    report = kitsune.explain()
    assert counts("tiles_untried") == [0] and not report.mended and not counts("graph_refused")[0]
    assert len(report.tiles) >= 3 and all(us > 0 for line in report.tiles for us in line.micros.values())
    assert any(len(line.micros) > 2 for line in report.tiles)
    # The next process begins with them.
    forget()
    choices_in.cache_clear()
    train(kitsune.accelerate(), 4)
    assert kitsune.wait_for_kernels(SECONDS)
    train(kitsune.accelerate(), 20)
    assert counts("tiles_untried") == [0] and all(line.remembered for line in kitsune.explain().tiles)


def test_results_stay_as_near_as_with_the_first_choice() -> None:
    expected = train(contextlib.nullcontext(), 40)
    for _ in range(3):
        got = train(kitsune.accelerate(), 40)
        assert kitsune.wait_for_kernels(SECONDS)
    train(kitsune.accelerate(), 6000, all_tried)
    got = train(kitsune.accelerate(), 40)
    assert counts("tiles_tried")[0] > 0
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_with_deterministic_algorithms_bits_do_not_depend_on_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        runs = []
        for tuning in ("off", "on", "on", "on"):
            with config.patch(tuning=tuning):
                for _ in range(4):
                    train(kitsune.accelerate(), 12)
                    assert kitsune.wait_for_kernels(SECONDS)
                unfused = counts("unfused")
                runs.append(train(kitsune.accelerate(), 600))
                assert counts("unfused") == unfused, "what is run unfused adds up as eager does"
        assert counts("tiles_tried")[0] > 0, "those that keep their bits"
        for other in runs[1:]:
            assert all(map(torch.equal, runs[0], other))
    finally:
        torch.use_deterministic_algorithms(False)


def test_trials_take_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    # No tile is that much faster: nothing is captured again.
    monkeypatch.setattr("kitsune.codegen.choices.FASTER", 0.0)
    # And none is tried before the last training is in its steady state.
    monkeypatch.setattr("kitsune.tuning.AFTER", 4 * 10 + 20)

    def risen(tuning: str) -> int:
        """Bytes by which memory rises above the most of before, once the step is replayed."""
        steps, most = 0, 0

        def is_over() -> bool:
            nonlocal steps, most
            steps += 1
            if steps == 20:
                assert counts("replayed")[0] > 0 and counts("tiles_tried") == [0]
                most = torch.cuda.max_memory_allocated()
            return False

        with config.patch(tuning=tuning):
            for _ in range(4):
                train(kitsune.accelerate(), 10)
                assert kitsune.wait_for_kernels(SECONDS)
            # Nothing that an earlier training needed is between the trials and the most of this one.
            gc.collect()
            torch.cuda.reset_peak_memory_stats()
            train(kitsune.accelerate(), 1500, is_over)
            return torch.cuda.max_memory_allocated() - most

    assert risen("off") == 0
    forget()
    assert risen("on") == 0 and counts("tiles_tried")[0] > 0


def launches(program: Callable[..., Any], *inputs: torch.Tensor) -> list[Launch]:
    """The kernels of a program."""
    return [one for one in plan_of(lambda: program(*inputs), numerics="strict").launches if one.kernels]


X = torch.zeros(512, 4096)
PROGRAMS: dict[str, Callable[..., Any]] = {
    "elements": lambda x: (x * 2 + 1).relu(),
    "strided": lambda x: (x.t() + 1).exp(),
    "largest of rows": lambda x: (x * 3).amax(1),
    "largest of columns": lambda x: (x * 3).amax(0),
    "position in columns": lambda x: x.argmax(0),
    "sum of rows": lambda x: x.sum(1),
    "sum of columns": lambda x: (x * 2).sum(0),
    "variance": lambda x: x.var(0),
    "softmax": lambda x: x.softmax(1),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_tile_computes_the_same(name: str, tmp_path: Path) -> None:
    compiler = Compiler(tmp_path)
    for launch in launches(PROGRAMS[name], X):
        kernel = launch.kernels[0]
        accesses = (*kernel.loads, *(store.access for store in kernel.stores))
        torch.manual_seed(0)
        memory = {a.value.storage: torch.randn(X.numel(), device=DEVICE).double() for a in accesses}
        found = []
        for tile in candidates(kernel):
            one = replace(launch, tile=tile)
            made = {s: t.clone() for s, t in memory.items()}
            tensors = {a.value.storage: made[a.value.storage].to(a.value.type.dtype) for a in accesses}
            PreparedLaunch(one, program_of(one), compiler, DEVICE).start(
                lambda a, tensors=tensors: tensors[a.value.storage].data_ptr(), [1.0], torch.cuda.current_stream().cuda_stream
            )
            found.append([tensors[store.access.value.storage].clone() for store in kernel.stores])
        for other in found[1:]:
            for a, b in zip(found[0], other, strict=True):
                if keeps_bits(kernel):
                    assert torch.equal(a, b)
                else:
                    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_timer_tells_the_device_time_of_each() -> None:
    small, large = (torch.zeros(n << 20, dtype=torch.uint8, device=DEVICE) for n in (64, 1024))

    def seconds() -> list[float]:
        told = in_turn([lambda: small.fill_(1), lambda: large.fill_(1), lambda: small.fill_(1)])  # type: ignore[arg-type, return-value]
        torch.cuda.synchronize()
        found = told()
        assert found is not None
        return found

    seconds()
    first, second, third = seconds()
    assert 4 < second / first < 64 and 0.5 < first / third < 2


def test_a_round_does_not_wait_for_the_device(tmp_path: Path) -> None:
    compiler = Compiler(tmp_path)
    (launch,) = launches(PROGRAMS["elements"], X)
    tiles = {tile: replace(launch, tile=tile) for tile in candidates(launch.kernels[0])}
    trial = Trial(launch, {tile: PreparedLaunch(one, program_of(one), compiler, DEVICE) for tile, one in tiles.items()})
    memory = torch.empty(trial.nbytes, dtype=torch.uint8, device=DEVICE)
    stream = torch.cuda.current_stream().cuda_stream
    trial.round(memory, in_turn, stream)
    torch.cuda.synchronize()
    for _ in range(ROUNDS - 1):
        assert not trial.is_open
        torch.cuda._sleep(400_000_000)
        trial.round(memory, in_turn, stream)
        assert trial.is_open, "the device sleeps for 0.2 s, and the host went on"
        torch.cuda.synchronize()
    assert not trial.is_open and trial.is_done and len(trial.micros) == len(tiles)
