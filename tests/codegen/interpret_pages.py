"""Run in a process of its own, for Triton's interpreter must be chosen before Triton is imported: prints a line per difference.

Usage: python -m tests.codegen.interpret_pages <folder for sources>
"""

from __future__ import annotations

import itertools
import os
import random
import sys
from dataclasses import replace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch

from kitsune.codegen import COPY_RESULT, COPY_TENSORS, READ_PAGE, Compiler
from kitsune.ir.page import HEAD, N_PAGES
from kitsune.ir.program import Tile
from tests.runtime.pages import NaiveCompiler

CPU = torch.device("cpu")


def compare_pages(kernels: Any) -> None:
    """Pages of a ring, read one after the other, beyond its end."""
    for n, n_numbers in itertools.product((0, 1, 63, 64, 65), (0, 1, 70)):
        words = HEAD + n + n_numbers
        first = torch.randint(-(2**62), 2**62, (N_PAGES, words))
        for count in (0, 1, N_PAGES - 1, N_PAGES, 12345, 16 * 999, 16 * 999 + 8):
            first[count % N_PAGES, 0] = n_numbers if count % 2 else 0
            found = []
            for kernel in kernels:
                over, state, numbers = torch.full((1,), -1), torch.full((2 + n,), count), torch.full((n_numbers + 1,), 7)
                at = state.data_ptr()
                kernel.launch(1, [first.data_ptr(), over.data_ptr(), at, at + 8, numbers.data_ptr(), n, words], 0)
                found.append(torch.cat([over, state, numbers]))
            if not torch.equal(*found):
                print(f"page {count} with {n} addresses and {n_numbers} numbers: {found}")


def compare_copies(kernels: Any) -> None:
    """Tensors of many sizes from and to many alignments, some of them nowhere."""
    random.seed(0)
    block = kernels[0].block
    for sizes in ([1], [7, 8, 9], [block - 1, block, block + 1], [5 * block + 3, 16, 2 * block]):
        for _ in range(6):
            sources = [torch.randint(256, (size + 40,), dtype=torch.uint8) for size in sizes]
            begins = [random.choice((0, 1, 4, 8, 16)) for _ in sizes]
            ends = [random.choice((0, 0, 8, 2, 16)) for _ in sizes]
            places = torch.tensor(
                [random.choice((1, 1, 1, 0)) * (t.data_ptr() + b) for t, b in zip(sources, begins, strict=True)]
            )
            counts = [-(-size // block) for size in sizes]
            owners = torch.repeat_interleave(torch.arange(len(sizes), dtype=torch.int32), torch.tensor(counts))
            found = []
            for kernel in kernels:
                targets = [torch.full((size + 40,), 7, dtype=torch.uint8) for size in sizes]
                firsts = [sum(counts[:k]) for k in range(len(sizes))]
                rows = torch.tensor([[t.data_ptr() + e, s, f] for t, e, s, f in zip(targets, ends, sizes, firsts, strict=True)])
                kernel.launch(len(owners), [places.data_ptr(), rows.data_ptr(), owners.data_ptr()], 0)
                found.append(torch.cat(targets))
            if not torch.equal(*found):
                print(f"{sizes} bytes from {begins} to {ends}: {int((found[0] != found[1]).sum())} bytes differ")


def compare_results(kernels: Any) -> None:
    """Results of up to 16 bytes, to any address or none."""
    for size, begins_at, is_told in itertools.product((1, 2, 4, 8, 12, 16), (0, 3), (True, False)):
        source, found = torch.randint(1, 256, (32,), dtype=torch.uint8), []
        for kernel in kernels:
            target = torch.full((32,), 7, dtype=torch.uint8)
            place = torch.tensor([(target.data_ptr() + begins_at) * is_told])
            kernel.launch(1, [place.data_ptr(), source.data_ptr(), size], 0)
            found.append(target)
        if not torch.equal(*found):
            print(f"a result of {size} bytes: {found}")


if __name__ == "__main__":
    compiler = Compiler(sys.argv[1], interpret=True)
    # Small blocks: the interpreter takes long over each.
    small = replace(COPY_TENSORS, tile=Tile(256, 0, 4))
    for program, compared in ((READ_PAGE, compare_pages), (small, compare_copies), (COPY_RESULT, compare_results)):
        compared([made.compile(program, CPU, 1, False) for made in (compiler, NaiveCompiler())])
