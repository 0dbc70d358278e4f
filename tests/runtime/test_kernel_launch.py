"""Starts of a program that reads moving numbers from memory: each finds there what its run was given."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from kitsune.codegen import parameters_of, render
from kitsune.ir import Kernel, Launch, Program
from kitsune.ir.program import SlotAddress
from kitsune.runtime.kernel_launch import PreparedLaunch
from kitsune.runtime.slots import SlotTable
from tests.codegen.build import build


class Reading:
    """A compiler whose programs only note the numbers that they would read."""

    block = 1024

    def __init__(self) -> None:
        self.read: list[list[float]] = []

    def compile(self, program: Program, target: Any, aligned: bool, wide: bool) -> Reading:
        self.program = program
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
    assert [t.memory.tolist() for t, _ in launch._numbers.values()] == [[1.0, 1.0], [2.0, 2.0]]


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
