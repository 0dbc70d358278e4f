"""What the kernels at the beginning of a graph do, in plain Python over CPU memory."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch

from kitsune.codegen import PAGE_PROGRAMS
from kitsune.ir.page import HEAD, N_PAGES, TOLD_EVERY
from kitsune.runtime import PageReader


def words_at(address: int, n: int = 1) -> Any:
    return (ctypes.c_int64 * n).from_address(address)


def naive_read_page(_: int, __: int, first: int, over: int, count: int, places: int, numbers: int, n: int, words: int) -> None:
    k = words_at(count)[0]
    if k % TOLD_EVERY == 0:
        words_at(over)[0] = k
    page = words_at(first + 8 * words * (k % N_PAGES), words)
    words_at(places, n)[:] = page[HEAD : HEAD + n]
    words_at(numbers, page[0])[:] = page[HEAD + n : HEAD + n + page[0]]
    words_at(count)[0] = k + 1


def naive_copy_tensors(block: int, n_bytes: int, places: int, rows: int, owners: int) -> None:
    k = (ctypes.c_int32 * (block + 1)).from_address(owners)[block]
    source = words_at(places, k + 1)[k]
    target, size, first = words_at(rows, 3 * (k + 1))[3 * k :]
    start = (block - first) * n_bytes
    if source:
        ctypes.memmove(target + start, source + start, min(n_bytes, size - start))


def naive_copy_result(_: int, __: int, place: int, source: int, size: int) -> None:
    if words_at(place)[0]:
        ctypes.memmove(words_at(place)[0], source, size)


FUNCTIONS = {"read_page": naive_read_page, "copy_tensors": naive_copy_tensors, "copy_result": naive_copy_result}


class Naive:
    """A kernel of this file."""

    def __init__(self, function: Callable[..., None], block: int) -> None:
        self.function, self.block = function, block

    def launch(self, grid: int, args: Sequence[Any], stream: int) -> None:
        for block in range(grid):
            self.function(block, self.block, *args)

    def load(self) -> None:
        pass


class NaiveCompiler:
    """Knows these three."""

    def compile(self, program: Any, target: torch.device, divisibility: int, wide: bool) -> Naive:
        return Naive(FUNCTIONS[program.name], program.tile.rows)


def naive_reader() -> PageReader:
    return PageReader(PAGE_PROGRAMS, NaiveCompiler(), torch.device("cpu"))
