"""Static functions on a GPU: trainings as in eager, with whole regions replayed as CUDA graphs and no Python in between."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kitsune
from kitsune.config import config
from tests.runtime.test_capture_cuda import repeatable  # noqa: F401 - a fixture of each test here
from tests.static import test_guards as guards
from tests.static.programs import Training, adamw, compare, dropping, meddling, mlp, normed, sgd, straight
from tests.static.test_static import clipped, left_for_later, reads_a_constant, two_steps, with_a_module_for_one_call

pytestmark = pytest.mark.gpu
FUSE = pytest.mark.parametrize("fuse", [True, False], ids=["fused", "op by op"])
# As on a CPU, where `AGAIN` is what a change costs.
WARM, AGAIN = 5, 5


def convolutions() -> nn.Module:
    first = nn.Sequential(nn.Conv2d(1, 8, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1))
    return nn.Sequential(nn.Unflatten(1, (1, 2, 3)), first, nn.Flatten(), nn.Linear(16, 3))


def mixed(t: Training, x: Tensor, y: Tensor) -> Tensor:
    t.optimizer.zero_grad()
    with torch.autocast("cuda", torch.bfloat16):
        loss = F.cross_entropy(t.model(x), y)
    loss.backward()
    t.optimizer.step()
    return loss.detach()


@FUSE
@pytest.mark.parametrize("model", [mlp, dropping, normed, convolutions], ids=lambda f: f.__name__)
@pytest.mark.parametrize("optimizer", [sgd, adamw], ids=lambda f: f.__name__)
def test_a_training_is_as_in_eager(model: Any, optimizer: Any, fuse: bool) -> None:
    with config.patch(fuse=fuse):
        _, counters = compare(straight(40), at_most=WARM, device="cuda", model=model, optimizer=optimizer)
    assert counters["replayed"] > 20 and not counters["graph_refused"] and not counters["static_refused"], counters


@FUSE
@pytest.mark.parametrize(
    "body", [mixed, clipped, two_steps, left_for_later, with_a_module_for_one_call], ids=lambda f: f.__name__
)
def test_other_steps(body: Any, fuse: bool) -> None:
    with config.patch(fuse=fuse):
        _, counters = compare(straight(40), at_most=WARM + 2, device="cuda", body=body, optimizer=adamw, model=dropping)
    assert counters["replayed"] > 20, counters


def test_a_constant_that_python_reads() -> None:
    compare(straight(40), at_most=WARM + 2, device="cuda", body=reads_a_constant, optimizer=adamw)


@FUSE
@pytest.mark.parametrize("optimizer", [sgd, adamw], ids=lambda f: f.__name__)
def test_a_learning_rate_that_moves_every_step(optimizer: Any, fuse: bool) -> None:
    def drive(t: Training) -> None:
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(t.optimizer, T_max=40)
        for i in range(40):
            t.take(i)
            schedule.step()

    with config.patch(fuse=fuse):
        _, counters = compare(drive, at_most=WARM, device="cuda", optimizer=optimizer)
    assert counters["replayed"] > 20, counters


@FUSE
def test_results_and_gradients_that_are_held_stay_as_they_are(fuse: bool) -> None:
    def drive(t: Training) -> None:
        for i in range(30):
            loss = t.take(i)
            t.kept += [loss.view(1), loss * 2, *[p.grad for p in t.model.parameters()]]

    with config.patch(fuse=fuse):
        _, counters = compare(drive, at_most=WARM, device="cuda")
    assert counters["moved"] > 50 and counters["replayed"] > 15, counters


@pytest.mark.parametrize(("change", "how"), guards.CHANGES, ids=lambda x: getattr(x, "__name__", ""))
def test_a_change_is_noticed(change: Any, how: dict[str, Any]) -> None:
    if change is guards.replaced_module:
        pytest.skip("it makes a module on the CPU")
    compare(meddling(change, at=9, n=24), at_most=WARM + AGAIN, device="cuda", **how)


def test_a_model_that_moves_there_and_back() -> None:
    def move(t: Training) -> None:
        t.model.cpu().cuda()

    compare(meddling(move, at=12, n=30), at_most=WARM + AGAIN, device="cuda")


def test_batches_from_the_host_and_a_short_one() -> None:
    def drive(t: Training) -> None:
        xs, ys = t.xs.cpu().pin_memory(), t.ys.cpu().pin_memory()
        for i in range(40):
            n = 3 if i % 5 == 4 else 4
            t.kept.append(t.step(xs[i][:n].cuda(non_blocking=True), ys[i][:n].cuda(non_blocking=True)))

    _, counters = compare(drive, at_most=2 * WARM, device="cuda")
    assert counters["replayed"] > 15, counters


def test_an_audit_agrees() -> None:
    _, counters = compare(straight(40), at_most=WARM + 5, device="cuda", audit=8, model=dropping, optimizer=adamw)
    assert counters["static_audits"] == 4


def test_a_stream_of_the_programs_own() -> None:
    def drive(t: Training) -> None:
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            straight(30)(t)
        torch.cuda.synchronize()

    compare(drive, at_most=WARM, device="cuda")


def test_the_gate_leaves_it_alone() -> None:
    with config.patch(gate=True):
        _, counters = compare(straight(40), at_most=WARM, device="cuda")
    assert counters["gate_left"] == 0 and kitsune.counters()["replayed"] > 20
