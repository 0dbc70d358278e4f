"""A trial without a device: where operands lie in scratch memory, what is in it, and which settings a tuner goes by."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import kitsune
from kitsune.codegen import candidates, tile_of
from kitsune.ir import Access, Kernel, Launch, Tile
from kitsune.profiler import Tally
from kitsune.runtime import Trial
from kitsune.runtime.trials import ALIGNMENT, FILLING, places_of
from kitsune.tuning import Tuner
from tests.codegen.build import build
from tests.plan.recorded import plan_of
from tests.runtime.tuned import Device, bench, second_is_fastest

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    kitsune.reset()
    yield


def launch_of(program: Callable[..., Any], *inputs: torch.Tensor) -> Launch:
    (launch,) = (one for one in plan_of(lambda: program(*inputs), numerics="strict").launches if one.kernels)
    return launch


def spans(kernel: Kernel) -> dict[int, tuple[int, int, Access]]:
    """First byte and end of each access, by its id."""
    places, _ = places_of(kernel)
    found = {}
    for access in (*kernel.loads, *(store.access for store in kernel.stores)):
        reach = sum((n - 1) * stride for n, stride in zip(kernel.domain, access.strides, strict=True))
        first = places[id(access)]
        found[id(access)] = (first, first + (reach + 1) * access.value.type.dtype.itemsize, access)
    return found


WIDE = torch.zeros(64, 96)


def parts(x: torch.Tensor) -> torch.Tensor:
    """Reads two parts of one result."""
    y = x @ torch.ones(96, 96)
    return (y[1:33, 3:40] * y[31:63, 40:77]).exp()


PROGRAMS: list[tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = [
    (lambda x, y: (x + y).relu(), (WIDE, torch.zeros(64, 96))),
    (lambda x, y: (x.t() * y).exp(), (torch.zeros(96, 64), WIDE)),
    (lambda x: (x[:, 3:40] * 2).abs(), (WIDE,)),
    (parts, (WIDE,)),
    (lambda x: x[1:33].mul_(2).add_(1), (WIDE,)),
    (lambda x: x.mul_(2) + x.sum(0), (WIDE,)),
    (lambda x, b: (x + b).bfloat16(), (WIDE, torch.zeros(96))),
]


@pytest.mark.parametrize(("program", "inputs"), PROGRAMS, ids=range(len(PROGRAMS)))
def test_operands_lie_apart_and_inside_and_as_they_do_in_their_own_memory(program: Any, inputs: Any) -> None:
    for launch in plan_of(lambda: program(*inputs), numerics="strict").launches:
        if not launch.kernels:
            continue
        kernel = launch.kernels[0]
        found, nbytes = spans(kernel), places_of(kernel)[1]
        assert found and all(0 <= first < end <= nbytes - ALIGNMENT for first, end, _ in found.values())
        for a_first, a_end, a in found.values():
            offset = a.value.type.offset * a.value.type.dtype.itemsize
            assert a_first % ALIGNMENT == offset % ALIGNMENT
            for b_first, b_end, b in found.values():
                if a.value.storage == b.value.storage:
                    assert a_first - b_first == offset - b.value.type.offset * b.value.type.dtype.itemsize
                else:
                    assert a_end <= b_first or b_end <= a_first


class Still:
    """Starts nothing, and notes where it would have."""

    def __init__(self, launch: Launch) -> None:
        self.launch, self.addresses = launch, list[int]()
        self.n_scalars = 0

    def start(self, address: Callable[[Access], int], scalars: list[float], stream: int) -> None:
        self.addresses += [address(access) for access in self.launch.kernels[0].loads]
        self.n_scalars = len(scalars)


def immediately(runs: list[Callable[[], None]]) -> Callable[[], list[float] | None]:
    for run in runs:
        run()
    return lambda: [1e-6] * len(runs)


def test_a_round_fills_what_is_read_and_stays_inside_of_its_memory() -> None:
    launch = launch_of(lambda x, y: (x + y).relu(), WIDE, torch.zeros(64, 96))
    programs = {tile: Still(launch) for tile in candidates(launch.kernels[0])}
    trial = Trial(launch, programs)
    around = torch.zeros(trial.nbytes + 200, dtype=torch.uint8)
    trial.round(around[100:], immediately, 0)
    assert around[:100].count_nonzero() == 0 == around[100 + trial.nbytes :].count_nonzero()
    assert bool((around[100 : 100 + trial.nbytes] == FILLING).all()), "no NaN and nothing that is near to zero"
    first, end = around.data_ptr() + 100, around.data_ptr() + 100 + trial.nbytes
    for program in programs.values():
        assert program.addresses and all(first <= at < end and at % 16 == 0 for at in program.addresses)


def test_moving_numbers_are_there_to_be_read() -> None:
    kernel = build(lambda x: x * 0.3, [torch.zeros(4096)], moving=(0.3,)).kernel
    launch = Launch(kernels=(kernel,))
    one = Still(launch)
    Trial(launch, {tile_of(kernel): one}).round(torch.empty(1 << 20, dtype=torch.uint8), immediately, 0)
    assert one.n_scalars == 1


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_tuner_goes_by_the_settings_of_now(deterministic: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kitsune.codegen.choices.WORTH_BYTES", 0)
    x = torch.ones(100, 64 * 1024)
    plan = plan_of(lambda: (x * 2).sum(0), numerics="strict")
    (launch,) = (one for one in plan.launches if one.kernels)
    tuner = Tuner(bench(Device(second_is_fastest), tmp_path), lambda nbytes: None, Tally(), CPU)
    torch.use_deterministic_algorithms(deterministic)
    try:
        assert len(tuner._untried(plan)) == (not deterministic)
        first, second, *_ = candidates(launch.kernels[0])
        tuner.choices.keep(launch.kernels[0], {first: 2.0, second: 1.0})
        tile: Tile | None = tuner.tiles()(launch)
        assert tile == (None if deterministic else second)
        assert (tuner.changed(plan) is plan) is deterministic
    finally:
        torch.use_deterministic_algorithms(False)


def test_kernels_that_move_next_to_nothing_of_a_step_are_left_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kitsune.codegen.choices.WORTH_BYTES", 0)
    x, w = torch.ones(512, 512), torch.ones(512, 512)
    plan = plan_of(lambda: ((x @ w + 1).relu() @ w, (x[:128, :64] * 2).exp()))
    tuner = Tuner(bench(Device(second_is_fastest), tmp_path), lambda nbytes: None, Tally(), CPU)
    names = [launch.name for launch in plan.launches if launch.kernels]
    assert len(names) == 2 and [launch.nbytes > 1 << 20 for launch in tuner._untried(plan)] == [True, False]
    monkeypatch.setattr("kitsune.tuning.LEAST_SHARE", 0.1)
    assert [launch.nbytes > 1 << 20 for launch in tuner._untried(plan)] == [True]
