"""Starts of a program that reads moving numbers from memory: each finds there what its run was given."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, cast

import pytest
import torch

from kitsune.backends import on_device
from kitsune.codegen import parameters_of, render
from kitsune.config import config
from kitsune.ir import Kernel, Launch, Program
from kitsune.ir.program import SlotAddress
from kitsune.runtime import launch_tables
from kitsune.runtime.kernel_launch import KernelUnavailable, PreparedLaunch
from kitsune.runtime.slots import SlotTable
from tests.codegen.build import build
from tests.codegen.test_tiles import launch_of

SECONDS = 60.0


class Reading:
    """A compiler whose programs only note the numbers that they would read."""

    block = 1024

    def __init__(self) -> None:
        self.read: list[list[float]] = []
        self.asked: list[Future[Any]] = []
        self.divisibilities: list[int] = []

    def ask(self, program: Program, *variant: Any) -> Future[Any]:
        self.asked.append(Future())
        return self.asked[-1]

    def expect(self) -> None:
        pass

    def compile(self, program: Program, target: Any, divisibility: int, wide: bool) -> Reading:
        self.program = program
        self.divisibilities.append(divisibility)
        return self

    def parameters_of(self, kernel: Kernel, slots_in_memory: bool = False) -> Any:
        return parameters_of(kernel, slots_in_memory)

    def launch(self, grid: int, args: Sequence[Any], stream: int) -> None:
        rows = [args]
        if self.program.batched:
            width = len(self.program.parameters) + 1
            n_rows = 2
            table = struct.unpack(f"{width * n_rows}q", ctypes.string_at(args[0], 8 * width * n_rows))
            rows = [table[i * width : (i + 1) * width] for i in range(n_rows)]
        self.read.append([ctypes.c_double.from_address(row[i]).value for row in rows for i in places(self.program)])

    def load(self) -> None:
        pass


def places(program: Program) -> list[int]:
    return [i for i, parameter in enumerate(program.parameters) if isinstance(parameter, SlotAddress)]


def launches(n: int) -> tuple[PreparedLaunch, Reading]:
    compiler, kernels = Reading(), []
    for _ in range(n):
        kernels.append(build(lambda x: x * 0.5 + 0.25, [torch.randn(64)], "k", (0.5, 0.25)).kernel)
    program = render(kernels[0], n > 1, slots_in_memory=True)
    return PreparedLaunch(Launch(tuple(kernels)), program, compiler, torch.device("cpu"), slots_in_memory=True), compiler


def anywhere(access: Any) -> int:
    return 4096


@pytest.mark.parametrize("n", [1, 2])
def test_an_ordinary_start_reads_the_numbers_of_its_run(n: int) -> None:
    launch, compiler = launches(n)
    for numbers in ([2.0, 3.0], [2.0, 3.0], [5.0, -0.0]):
        launch.start(anywhere, numbers, 0)
    assert compiler.read == [numbers * n for numbers in ([2.0, 3.0], [2.0, 3.0], [5.0, -0.0])]


def sums(*shapes: tuple[int, int]) -> tuple[PreparedLaunch, Reading]:
    """The sums of the rows of each."""
    kernels = [launch_of(lambda x: x.sum(1), torch.zeros(shape)).kernels[0] for shape in shapes]
    compiler = Reading()
    launch = PreparedLaunch(Launch(tuple(kernels)), render(kernels[0], len(kernels) > 1), compiler, torch.device("cpu"))
    return launch, compiler


@pytest.mark.parametrize(("columns", "divisibility"), [(64, 16), (48, 16), (40, 8), (1000, 8), (196, 4), (98, 2), (33, 1)])
def test_a_kernel_is_started_with_what_divides_its_rows(columns: int, divisibility: int) -> None:
    # The number of rows is nobody's neighbour.
    launch, compiler = sums((7, columns))
    assert launch.likely == (divisibility, False)
    launch.start(anywhere, [], 0)
    launch.start(lambda access: 4096 + 8, [], 0)
    assert compiler.divisibilities == ([divisibility, 1] if divisibility > 1 else [1])


@pytest.mark.parametrize(("columns", "divisibility"), [((64, 48), 16), ((64, 1000), 1), ((98, 98), 1)])
def test_a_batch_knows_of_multiples_of_16_and_of_none(columns: tuple[int, int], divisibility: int) -> None:
    launch, compiler = sums(*((7, n) for n in columns))
    launch.start(anywhere, [], 0)
    assert launch.likely == (divisibility, False) and compiler.divisibilities == [divisibility]


def test_elements_that_nothing_is_reduced_of_have_two_variants() -> None:
    for n, divisibility in ((64, 16), (40, 1)):
        kernel = build(lambda x: x * 0.5, [torch.zeros(n)], "half").kernel
        assert PreparedLaunch(Launch((kernel,)), render(kernel), Reading(), torch.device("cpu")).likely == (divisibility, False)


def test_a_run_may_have_more_numbers_than_the_kernel_reads() -> None:
    launch, compiler = launches(1)
    for numbers in ([2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0]):
        launch.start(anywhere, numbers, 0)
    assert compiler.read == [[2.0, 3.0], [4.0, 5.0], [7.0, 8.0]]


def test_a_table_takes_the_numbers_that_it_has_room_for() -> None:
    table = SlotTable(2, torch.device("cpu"))
    for numbers, expected in (([1.0, 2.0, 3.0], [1.0, 2.0]), ([4.0, 5.0], [4.0, 5.0]), ([6.0], [6.0, 5.0])):
        table.set(numbers)
        assert table.memory.tolist() == expected


def test_streams_have_tables_of_their_own() -> None:
    # What one stream still reads must not change because another goes on.
    launch, _ = launches(1)
    launch.start(anywhere, [1.0, 1.0], 0)
    launch.start(anywhere, [2.0, 2.0], 7)
    assert [t.memory.tolist() for t in launch._numbers.values()] == [[1.0, 1.0], [2.0, 2.0]]


def test_a_capture_reads_the_table_that_it_was_given() -> None:
    launch, compiler = launches(1)
    launch.start(anywhere, [1.0, 1.0], 0)
    table = torch.tensor([8.0, 9.0], dtype=torch.float64)
    launch.captured_with(table.data_ptr()).start(anywhere, [3.0, 3.0], 0)
    assert compiler.read == [[1.0, 1.0], [8.0, 9.0]]


def test_rows_of_a_captured_batch_have_addresses_in_that_table(monkeypatch: pytest.MonkeyPatch) -> None:
    launch, compiler = launches(2)
    # The rows are written when the capture is over.
    monkeypatch.setattr(compiler, "launch", lambda *args: None)
    captured = launch.captured_with(4000)
    captured.load(like=launch)
    captured.start(anywhere, [3.0, 3.0], 0)
    captured.fill_tables()
    rows = captured._tables._memory.tolist()  # type: ignore[attr-defined]
    assert [row[i] for row in rows for i in places(launch.program)] == [4000, 4008] * 2


def test_which_kernel_a_block_belongs_to_is_worked_out_once_and_before_a_start(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    owners_of = launch_tables.owners_of
    monkeypatch.setattr(launch_tables, "owners_of", lambda sizes, block: made.append(block) or owners_of(sizes, block))
    launch, compiler = launches(2)
    backend = on_device("sm_90", cast(Any, compiler), torch.device("cpu"))
    assert backend.warm is not None
    with config.patch(pages=False):
        *programs, ready = backend.warm(launch.launch, launch)
    assert programs == compiler.asked and not ready.done()
    programs[0].set_result(compiler)
    ready.result(SECONDS)
    assert made == [1024]
    launch.start(anywhere, [1.0, 2.0], 0)
    captured = launch.captured_with(4000)
    captured.load(like=launch)
    assert made == [1024]
    compiler.block = 512
    captured.load(like=launch)
    assert made == [1024, 512]


def test_the_kernels_of_blocks_are_there_for_each_stream_and_once_a_capture_is_over() -> None:
    tables, sizes = launch_tables.Tables(torch.device("cpu")), [1500, 10]
    n, blocks = tables.blocks(sizes, 1024, 5)
    assert n == 3 and blocks.tolist() == [0, 0, 1] and tables.blocks(sizes, 1024, 5)[1] is blocks
    assert tables.blocks(sizes, 512, 5)[1].tolist() == [0, 0, 0, 1]
    tables.blocks(sizes, 1024, 7)
    assert set(tables._blocks) == {(1024, 5), (512, 5), (1024, 7)}, "what is written on another stream may not be there yet"
    later = launch_tables.LaterTables(torch.device("cpu"), tables)
    later.reserve(sizes, 2, 1024)
    n, kept = later.blocks(sizes, 1024, 9)
    assert n == 3 and kept is later.blocks(sizes, 1024, 5)[1] and not any(kept is one for _, one in tables._blocks.values())
    kept.fill_(-1)
    table = later.table([[1, 2], [3, 4]], sizes, 1024, 9)
    later.fill()
    assert kept.tolist() == [0, 0, 1] and table.tolist() == [[1, 2, 0], [3, 4, 2]]


@pytest.mark.gpu
def test_what_a_batch_reads_comes_to_a_busy_device_without_a_wait() -> None:
    device = torch.device("cuda")
    tables, sizes, busy = launch_tables.Tables(device), [1500, 10], torch.cuda.Event()
    later = launch_tables.LaterTables(device, tables)
    # Memory, and whatever is loaded for a first copy.
    torch.zeros(2, dtype=torch.int32).pin_memory().to(device, non_blocking=True)
    torch.cuda._sleep(2_000_000_000)
    busy.record()
    _, blocks = tables.blocks(sizes, 1024, torch.cuda.current_stream().cuda_stream)
    rows = tables.table([[1, 2], [3, 4]], sizes, 1024, torch.cuda.current_stream().cuda_stream)
    later.reserve(sizes, 2, 1024)
    _, kept = later.blocks(sizes, 1024, 0)
    table = later.table([[1, 2], [3, 4]], sizes, 1024, 0)
    later.fill()
    assert not busy.query(), "the host has waited for the device"
    assert blocks.tolist() == kept.tolist() == [0, 0, 1] and rows.tolist() == table.tolist() == [[1, 2, 0], [3, 4, 2]]


def test_a_batch_whose_program_failed_says_so_at_its_start() -> None:
    launch, compiler = launches(2)
    backend = on_device("sm_90", cast(Any, compiler), torch.device("cpu"))
    assert backend.warm is not None

    def fails(*_: Any) -> Any:
        raise RuntimeError("no compiler")

    compiler.compile = fails  # type: ignore[method-assign]
    with config.patch(pages=False):
        *programs, ready = backend.warm(launch.launch, launch)
    programs[0].set_exception(RuntimeError("no compiler"))
    assert ready.result(SECONDS) is None
    with pytest.raises(KernelUnavailable, match="no compiler"):
        launch.start(anywhere, [1.0, 2.0], 0)
