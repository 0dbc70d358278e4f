"""Kernels with reductions: in the interpreter against float64, as machine code without a device, and when they share a text."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import kitsune
from kitsune.codegen import Compiler, is_looped, render, text_key, tile_of, tiles, why_not_batched
from kitsune.codegen.lowering import lower_rules
from kitsune.ir import Kernel
from kitsune.ir.program import Program, Tile
from kitsune.scheduler import cost
from tests.codegen.build import compiled_kernel
from tests.codegen.reductions import CASES, DTYPES, RULES, SIZES, Case, draw, gathered
from tests.codegen.test_compiled import resources
from tests.plan.recorded import plan_of


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    kitsune.reset()
    yield


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Compiler:
    return Compiler(tmp_path_factory.mktemp("kernels"))


def kernels_of(program: Callable[..., Any], inputs: list[torch.Tensor]) -> list[Kernel]:
    plan = plan_of(lambda: program(*inputs), numerics="strict")
    return [kernel for launch in plan.launches for kernel in launch.kernels if kernel.reduced]


def only(program: Callable[..., Any], *inputs: torch.Tensor) -> Kernel:
    (kernel,) = kernels_of(program, list(inputs))
    return kernel


# At least so many kernels are run of each part; a dtype stands for every case of the table.
PARTS = dict.fromkeys((str(dtype).removeprefix("torch.") for dtype in DTYPES), 75) | {
    "layouts": 60,
    "special": 20,
    "batched": 6,
    "gathered": 10,
}


@pytest.mark.timeout(630)
@pytest.mark.parametrize("what", PARTS)
def test_results_are_as_near_to_float64_as_eagers(what: str, tmp_path: Path) -> None:
    pytest.importorskip("triton", minversion="3.7", reason="an interpreter that works with NumPy of today")
    command = [sys.executable, "-W", "ignore", "-m", "tests.codegen.interpret_reductions", str(tmp_path), what]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    *differences, n_kernels = done.stdout.splitlines()
    assert not differences, differences[:20]
    assert int(n_kernels) >= PARTS[what]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_size_that_is_interpreted_has_the_texts_of_a_large_one(case: Case) -> None:
    texts: dict[int, list[str]] = {}
    for n in (SIZES[-1], case.large or SIZES[-2]):
        plan = plan_of(partial(case.program, *draw(case.shapes(n), torch.bfloat16)), numerics="strict")
        kernels = [kernel for launch in plan.launches for kernel in launch.kernels]
        texts[n] = [program.text.replace(program.name, "kernel") for program in map(render, kernels)]
        turns = [kernel.n_columns / tile_of(kernel).columns for kernel in kernels if kernel.reduced and is_looped(kernel)]
        assert n == SIZES[-1] or all(n_turns > 1 and n_turns % 1 for n_turns in turns), "a whole one, and one that is not"
    small, large = texts.values()
    assert small == large


def test_the_table_has_every_rule_of_reductions() -> None:
    assert set(lower_rules) >= RULES


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize(("arch", "dtype", "n"), [(80, torch.float32, 512), (90, torch.bfloat16, 8192)], ids=str)
def test_it_compiles_and_loads_128_bits(case: Any, arch: int, dtype: torch.dtype, n: int, compiler: Compiler) -> None:
    pytest.importorskip("triton")
    inputs = [torch.zeros(shape, dtype=dtype) for shape in case.shapes(n)]
    found = kernels_of(case.program, inputs)
    assert found
    for kernel in found:
        ptx = compiled_kernel(compiler, render(kernel), arch).asm["ptx"]
        assert "div.full" not in ptx, "division is rounded correctly"
        wide = [a for a in kernel.loads if 0 not in a.strides[-kernel.reduced :]]
        if wide and tile_of(kernel).rows == 1 and kernel.n_columns >= 512:
            assert re.search(r"ld\.global\S*\.v4\.b32", ptx), "neighbours in a row are loaded together"


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.layer_norm(x, (x.shape[-1],), weight).relu()


def layer(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Kernel:
    return only(norm, torch.zeros(rows, columns, dtype=dtype), torch.zeros(columns, dtype=dtype))


def test_another_size_has_the_same_text_and_another_tile() -> None:
    first, second = layer(100, 256), layer(4096, 768)
    assert render(first).text == render(second).text and text_key(first) == text_key(second)
    assert tile_of(first) == Tile(1, 256, 1) and tile_of(second) == Tile(1, 1024, 2)


def test_a_long_row_has_another_text_with_a_loop_for_each_phase() -> None:
    short, long = layer(64, 768), layer(64, 50000)
    assert text_key(short) != text_key(long)
    assert "for start" not in render(short).text
    assert render(long).text.count("for start in range(0, whole, RBLOCK):") == 2
    assert render(long).text.count("for start in range(whole, columns, RBLOCK):") == 2, "and one for what is left of a row"


@pytest.mark.parametrize(
    ("program", "n", "dtype", "loop"),
    [
        (lambda x: x.sum(0), 1, torch.bfloat16, "tl.range(0, whole, RBLOCK, loop_unroll_factor=4)"),
        (lambda x: x.sum(0), 1, torch.float32, "tl.range(0, whole, RBLOCK, loop_unroll_factor=2)"),
        (lambda x, y: (x * y).sum(0), 2, torch.bfloat16, "tl.range(0, whole, RBLOCK, loop_unroll_factor=2)"),
        (lambda x, y: (x * y, (x * y).sum(0)), 2, torch.bfloat16, "tl.range(0, whole, RBLOCK, num_stages=3)"),
        (lambda x, y: (x * y).sum(0), 2, torch.float32, "range(0, whole, RBLOCK)"),
        (lambda x: x.sum(1), 1, torch.bfloat16, "range(0, whole, RBLOCK)"),
    ],
)
def test_what_a_loop_has_under_way(program: Callable[..., Any], n: int, dtype: torch.dtype, loop: str) -> None:
    kernel = kernels_of(program, [torch.zeros(512, 16384, dtype=dtype) for _ in range(n)])[0]
    assert f"for start in {loop}:" in render(kernel).text


LONG_ROWS: list[tuple[Callable[..., Any], int, int]] = [
    (lambda x: x.softmax(1), 1, 16384),
    (lambda x, y: torch.ops.aten._softmax_backward_data(x, y, 1, x.dtype), 2, 16384),
    (lambda x, y: torch.nn.functional.layer_norm(x, x.shape[1:], y[0], y[1]), 2, 16384),
]


@pytest.mark.parametrize(("program", "n_inputs", "n"), LONG_ROWS, ids=["softmax", "its backward", "layer norm"])
def test_a_row_that_is_written_is_held_in_registers_while_it_fits(
    program: Any, n_inputs: int, n: int, compiler: Compiler, tmp_path: Path
) -> None:
    pytest.importorskip("triton")
    kernel = only(program, *(torch.zeros(256, n, dtype=torch.bfloat16) for _ in range(n_inputs)))
    assert tile_of(kernel) == Tile(1, n, 16) and "for start" not in render(kernel).text
    registers, stack = resources(compiled_kernel(compiler, render(kernel), 90), tmp_path)
    assert stack == 0 and registers <= 128
    kitsune.reset()
    longer = only(program, *(torch.zeros(64, 2 * n) for _ in range(n_inputs)))
    assert "for start" in render(longer).text


def test_rows_that_are_gone_through_in_turn_are_loaded_ahead(compiler: Compiler, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    inputs = [torch.zeros(4096, 768, dtype=torch.bfloat16) for _ in range(2)] + [torch.zeros(768, dtype=torch.bfloat16)] * 2
    program = next(case.program for case in CASES if case.name == "layer norm backward, all")
    (kernel,) = [kernel for kernel in kernels_of(program, inputs) if kernel.gathered]
    assert tile_of(kernel) == Tile(1, 1024, 4)
    for arch in (80, 90):
        compiled = compiled_kernel(compiler, render(kernel), arch)
        registers, stack = resources(compiled, tmp_path)
        assert "cp.async" in compiled.asm["ptx"] and stack == 0 and registers <= 128
    # A tile of 4096 elements would take too much shared memory, and three blocks are at work together.
    wide = compiled_kernel(compiler, replace(render(kernel), tile=Tile(4, 1024, 16)), 90)
    assert "cp.async" not in wide.asm["ptx"] or wide.metadata.shared <= 3 * 32 << 10


def test_kernels_that_go_through_rows_in_turn_compile(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(cost, "BESIDE", 1)
    monkeypatch.setattr(cost, "ONE_BLOCK", 0)
    monkeypatch.setattr(tiles, "ENOUGH", 1)
    for name, program, inputs in gathered(torch.bfloat16):
        found = [kernel for kernel in kernels_of(program, inputs) if kernel.gathered]
        assert found, name
        for kernel in found:
            # What the interpreter takes the compiler may not: a mask of many rows for a number that all of them share.
            assert compiled_kernel(compiler, render(kernel), 90).asm["ptx"], name


def test_rows_of_odd_length_are_read_128_bits_at_a_time_where_they_begin_aligned(compiler: Compiler) -> None:
    pytest.importorskip("triton")
    whole = torch.zeros(64, 8320, dtype=torch.bfloat16)
    kernel = only(lambda x: x[:, :8191].float().logsumexp(1), whole)
    multiples = [line for line in render(kernel).text.splitlines() if line.startswith("MULTIPLES")]
    assert "in0_row" in multiples[0] and "columns" not in multiples[0]
    assert re.search(r"ld\.global\S*\.v4\.b32", compiled_kernel(compiler, render(kernel), 90).asm["ptx"])
    # Where the length of a row says where the next one begins, it counts.
    other = only(lambda x: x.float().logsumexp(1), whole)
    assert '"columns"' in next(line for line in render(other).text.splitlines() if line.startswith("MULTIPLES"))


def test_columns_are_held_only_where_a_loop_would_read_them_again() -> None:
    x = torch.zeros(64, 132 * 128)
    assert is_looped(only(lambda x: x.sum(0), x)) and is_looped(only(lambda x: (x * 2, (x * 2).sum(0)), x))
    assert not is_looped(only(lambda x: x.softmax(0), x)) and not is_looped(only(lambda x: x.sub(x.amax(0)).sum(0), x))
    assert not is_looped(only(lambda x: x.sum(0), x[:32]))


def test_a_long_row_of_which_only_a_sum_is_written_is_read_in_a_loop() -> None:
    assert "for start" in render(only(lambda x: x.sum(1), torch.zeros(512, 8192))).text


def test_maximum_and_sum_of_a_softmax_take_one_loop() -> None:
    kernel = only(lambda x: x.softmax(1), torch.zeros(256, 50000))
    assert render(kernel).text.count("range(0, whole") == 2, "one for both, and one that writes the result"
    chain = only(lambda x: x.log_softmax(1).exp().sum(1), torch.zeros(256, 50000))
    assert render(chain).text.count("range(0, whole") == 2, "nobody reads what is between"


def test_a_sum_that_something_is_made_of_for_every_element_keeps_its_dimension() -> None:
    x = torch.zeros(64, 512)
    # Also by way of numbers that each row has one of.
    spread = render(only(lambda x: x - (x.sum(1, keepdim=True) * 2 + 1).exp() * 3, x)).text
    assert "keep_dims=True" in spread and "tl.reshape" not in spread
    alone = render(only(lambda x: (x * 2).sum(1).exp(), x)).text
    assert "tl.reshape" in alone and "keep_dims=True" not in alone


def test_a_target_beyond_32_bits_is_beyond_the_row() -> None:
    case = next(case for case in CASES if case.name == "cross entropy in float32")
    texts = [render(kernel).text for kernel in kernels_of(case.program, draw(case.shapes(512), torch.bfloat16))]
    bounded = [line for text in texts for line in text.splitlines() if "< columns), x" in line]
    assert bounded and not any(re.search(r"= x\d+\.to\(tl\.int32\)", text) for text in texts)


def test_a_text_is_told_from_others_by_its_key() -> None:
    keys: dict[Any, str] = {}
    texts: dict[str, Any] = {}
    for case in CASES:
        for n in (64, 5000):
            for kernel in kernels_of(case.program, draw(case.shapes(n), torch.float32)):
                text = render(kernel).text.replace(render(kernel).name, "kernel")
                assert keys.setdefault(text_key(kernel), text) == text
                assert texts.setdefault(text, text_key(kernel)) == text_key(kernel)


def test_parameters_of_another_kernel_are_those_of_its_own_text() -> None:
    kernel = layer(100, 256)
    assert render(kernel).parameters == Compiler("unused").parameters_of(kernel)


def test_what_is_said_once_for_a_row_is_loaded_and_stored_once() -> None:
    kernel = only(lambda x: (x - x.mean(1, keepdim=True), x.amax(1)), torch.zeros(64, 512))
    text = render(kernel).text
    assert len(re.findall(r"tl\.store\(.*mask=in_rows\)", text)) == 1
    assert len(re.findall(r"tl\.store\(.*mask=inside\)", text)) == 1


def test_stores_into_memory_that_a_later_loop_reads_come_last() -> None:
    x = torch.zeros(256, 50000)

    def program() -> torch.Tensor:
        x.mul_(2)
        return x.sub(x.sum(1, keepdim=True)).amax(1)

    plan = plan_of(program, numerics="strict")
    (kernel,) = [kernel for launch in plan.launches for kernel in launch.kernels if kernel.reduced]
    text = render(kernel).text
    loops = text.split("range(0, whole")
    assert len(loops) == 3 and "tl.store" not in loops[1] and "tl.store" in loops[2]


def test_kernels_with_reductions_share_a_launch() -> None:
    kernel = only(lambda x: x.sum(0), torch.zeros(40, 96))
    assert why_not_batched(kernel) is None
    program = render(kernel, batched=True)
    assert isinstance(program, Program) and program.batched and program.tile == tile_of(kernel)
    assert "rows = tl.load(entry" in program.text and "columns = tl.load(entry" in program.text


def test_a_kernel_across_memory_reads_neighbours_of_several_rows() -> None:
    kernel = only(lambda x: x.sum(0), torch.zeros(2000, 96 * 132))
    tile = tile_of(kernel)
    assert tile.rows >= 32 and tile.columns >= 16
    assert 'MULTIPLES = ("in0", "out0", "rows",' in render(kernel).text
