"""Trainings on another CUDA device than the first are as in eager, whichever is the current one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import kitsune
from kitsune.config import config
from tests.static.programs import adamw, compare, dropping, straight
from tests.steady.loops import Loop, deterministic, differences, transformer
from tests.steady.test_early_reads import filters, logs, same

pytestmark = pytest.mark.gpu
SECOND = "cuda:1"
FUSE = pytest.mark.parametrize("fuse", [True, False], ids=["fused", "op by op"])
CURRENT = pytest.mark.parametrize("current", [0, 1])


@pytest.fixture(autouse=True)
def on_the_first_device(current: int) -> Iterator[None]:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    with torch.cuda.device(current), deterministic():
        yield
        assert torch.cuda.current_device() == current


@CURRENT
@pytest.mark.parametrize("optimizer", ["foreach Adam", "fused AdamW"])
def test_an_unmodified_loop(current: int, optimizer: str) -> None:
    expected, got = (Loop(make=transformer, optimizer=optimizer, per_epoch=20) for _ in range(2))
    expected.train(SECOND, 80)
    with config.patch(fuse=False):
        got.train(SECOND, 80, kitsune.accelerate(device=SECOND))
    assert not differences(expected.left(), got.left())
    assert kitsune.counters()["replayed"] > 20


@FUSE
@CURRENT
def test_numbers_that_are_read_are_not_read_before_they_are_there(current: int, fuse: bool) -> None:
    with config.patch(fuse=fuse, numerics="bitwise"):
        assert same(filters, 40, device=SECOND)[-1][:2] == (2, 1)
        assert same(logs, 40, device=SECOND)[-1][0] == 1


@FUSE
@CURRENT
def test_a_static_step(current: int, fuse: bool) -> None:
    with config.patch(fuse=fuse, numerics="bitwise"):
        _, counters = compare(straight(40), at_most=7, device=SECOND, optimizer=adamw, model=dropping)
    assert counters["replayed"] > 20 and not counters["graph_refused"], counters["graph_refused"]
