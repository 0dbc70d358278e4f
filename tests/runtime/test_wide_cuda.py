"""Tensors of more than 2^31 elements, on a GPU: kernels of each sort find all of them, and nothing beyond."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import kitsune
from kitsune.config import config
from tests.runtime.checked import forget

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
# Three more than there are 32-bit numbers of either sign, in rows of an odd length.
ROWS, COLUMNS = 2**16 + 1, 2**15 + 1


@pytest.fixture(autouse=True)
def fresh(tmp_path: Any) -> Iterator[None]:
    forget()
    with config.patch(cache_dir=str(tmp_path), numerics="strict"):
        yield
    forget()
    torch.cuda.empty_cache()


def numbers(dtype: torch.dtype = torch.uint8, device: str = "cuda") -> Tensor:
    """No two rows, and no two columns, are alike."""
    rows, columns = torch.arange(ROWS, device=device), torch.arange(COLUMNS, device=device)
    found = torch.empty(ROWS, COLUMNS, dtype=dtype, device=device)
    for start in range(0, ROWS, 4096):
        part = rows[start : start + 4096, None] * 131 + columns * 7 + rows[start : start + 4096, None] * columns // 5
        found[start : start + 4096] = part % 251
    return found


def pointwise(x: Tensor) -> list[Tensor]:
    return [(x + 1) ^ 5]


def of_rows_and_columns(x: Tensor) -> list[Tensor]:
    return [(x + x[:, :1]) ^ x[-1]]


def transposed(x: Tensor) -> list[Tensor]:
    return [(x.t() + 1) ^ x.t()[:, :1]]


def in_place(x: Tensor) -> list[Tensor]:
    y = x + 3
    y[1:].mul_(3).add_(x[:-1])
    return [y]


def along_rows(x: Tensor) -> list[Tensor]:
    return [(x * 2).amax(1), x.argmax(1)]


def along_columns(x: Tensor) -> list[Tensor]:
    return [(x * 2).amax(0)]


PROGRAMS = [(pointwise, torch.uint8), (of_rows_and_columns, torch.uint8), (transposed, torch.uint8), (in_place, torch.uint8)]
PROGRAMS += [(along_rows, torch.bfloat16), (along_columns, torch.bfloat16)]


@pytest.mark.parametrize(("program", "dtype"), PROGRAMS, ids=[program.__name__ for program, _ in PROGRAMS])
def test_all_elements_are_eagers(program: Callable[[Tensor], list[Tensor]], dtype: torch.dtype) -> None:
    x = numbers(dtype)
    expected = program(x)
    for _ in range(2):  # at first, some ops are made at once
        with kitsune.accelerate(warmup=0, device="cuda"):
            got = program(x)
        for mine, theirs in zip(got, expected, strict=True):
            assert torch.equal(mine, theirs)
        del got, mine
    assert kitsune.counters()["kernels"] > 0, kitsune.explain()
    assert not kitsune.explain().mended
