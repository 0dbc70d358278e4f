"""Looks at every address that interpreted kernels read and write, as compute-sanitizer's memcheck, initcheck and racecheck do.

    python -m tests.codegen.memory_check FOLDER [--out memory-check.jsonl]

runs a kernel of every rule of the table on 0, 1, 31, 33 and 1023 elements, in one row, and in three with operands across them.
Tests that run kernels in the interpreter look at these as well (`watch`). Programs of a grid run one after the other there, so a
race is seen by who touches an address, not by what comes of it:

    outside      an access that no mask keeps within the operand, or within the result for a store
    not written  an element of a result that no block has written, and that others would read
    race         an address that two blocks write, or that one writes and another reads
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import tests.conftest  # noqa: F401  (it sets what tests share)

import numpy  # isort: skip
import torch
from triton.runtime import interpreter

from kitsune.ir import Kernel
from kitsune.ir.plan import Access
from kitsune.ir.program import Program
from kitsune.runtime import kernel_launch
from kitsune.runtime.kernel_launch import PreparedLaunch

SIZES = (0, 1, 31, 33, 1023)
Array = Any
Ranges = list[tuple[int, int]]


class Watch:
    """Of one launch: where it may read and write, and where it has."""

    def __init__(self, readable: Ranges, writable: Ranges) -> None:
        self.readable, self.writable = readable, writable
        self.reads: list[tuple[Array, int]] = []
        self.writes: list[tuple[Array, int]] = []
        self.found: set[str] = set()

    def note(self, pointers: Any, mask: Any, program: int, store: bool) -> Any:
        """One instruction of one block: what its mask lets through. Gives a mask that keeps it inside."""
        through = numpy.broadcast_to(mask.data.astype(bool), pointers.data.shape).copy()
        at = pointers.data[through].astype(numpy.int64)
        size = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        inside = numpy.zeros(at.shape, bool)
        for start, end in self.writable if store else (*self.readable, *self.writable):
            inside |= (at >= start) & (at + size <= end)
        if not inside.all():
            self.found.add(f"outside: block {program} {'writes' if store else 'reads'} {int((~inside).sum())} elements")
        (self.writes if store else self.reads).append((at[inside], program))
        through[through] = inside
        return interpreter.TensorHandle(through, mask.dtype)

    def races(self) -> None:
        """Addresses that two blocks write, or one writes and another reads."""
        at, by = _joined(self.writes)
        order = numpy.argsort(at, kind="stable")
        at, by = at[order], by[order]
        if bool(((at[1:] == at[:-1]) & (by[1:] != by[:-1])).any()):
            self.found.add("race: two blocks write an element")
        read, reader = _joined(self.reads)
        place = numpy.searchsorted(at, read)
        known = place < len(at)
        known[known] = at[place[known]] == read[known]
        if bool((by[place[known]] != reader[known]).any()):
            self.found.add("race: a block reads what another one writes")

    def missing(self, expected: Array) -> None:
        """Elements of results that nobody has written."""
        n = len(numpy.setdiff1d(expected, _joined(self.writes)[0]))
        if n:
            self.found.add(f"not written: {n} elements")


def _joined(accesses: Sequence[tuple[Array, int]]) -> tuple[Array, Array]:
    if not accesses:
        return numpy.zeros(0, numpy.int64), numpy.zeros(0, numpy.int64)
    at = numpy.concatenate([a for a, _ in accesses])
    return at, numpy.repeat([program for _, program in accesses], [len(a) for a, _ in accesses])


def _range(access: Access, start: int) -> tuple[int, int]:
    return start, start + access.value.type.extent_bytes


def _walked(kernel: Kernel, access: Access, start: int) -> Array:
    """The address of each element that a store of the kernel is to write."""
    at = numpy.zeros(1, numpy.int64)
    for size, stride in zip(kernel.domain, access.strides, strict=True):
        at = (at[:, None] + numpy.arange(size if stride else min(size, 1)) * stride).ravel()
    return numpy.unique(start + at * access.value.type.dtype.itemsize)


class Check:
    """Everything that was seen in this process."""

    def __init__(self) -> None:
        self.n_launches = 0
        self.found: list[str] = []
        self.now: Watch | None = None
        # Tables of parameters and of moving numbers.
        self.tables: Ranges = []

    def watched(self, start: Callable[..., None], launch: PreparedLaunch, address: Any, scalars: Any, stream: int) -> None:
        """In place of the method `start` of a launch."""
        kernels = launch.launch.kernels
        reads = [_range(access, address(access)) for kernel in kernels for access in kernel.loads]
        stores = [(kernel, store.access, address(store.access)) for kernel in kernels for store in kernel.stores]
        outer, self.now = self.now, Watch([*reads, *self.tables], [_range(access, at) for _, access, at in stores])
        watch = self.now
        try:
            start(launch, address, scalars, stream)
        finally:
            self.now = outer
        watch.races()
        watch.missing(numpy.concatenate([_walked(*store) for store in stores if store[0].n_elements] or [_joined([])[0]]))
        self.n_launches += 1
        self.found += [f"{launch.name}: {told}" for told in sorted(watch.found)]

    def table(self, tensor: torch.Tensor) -> int:
        """In place of what asks a table of parameters for its address."""
        at = torch._C.TensorBase.data_ptr(tensor)
        self.may_read(at, at + tensor.nbytes)
        return at

    def arguments(self, fill: Callable[..., Any], bound: Any, address: Any, scalars: Any, slots_at: int) -> Any:
        """In place of what makes the arguments of a start, a table of moving numbers among them."""
        if bound.addresses:
            self.may_read(slots_at, slots_at + 8 * (1 + max(index for _, index in bound.addresses)))
        return fill(bound, address, scalars, slots_at)

    def may_read(self, start: int, end: int) -> None:
        if (start, end) not in self.tables:
            self.tables.append((start, end))
        if self.now is not None:
            self.now.readable.append((start, end))


def watch() -> Check:
    """Look at all launches of this process from now on."""
    check, start, fill = Check(), PreparedLaunch.start, kernel_launch._Bound.fill
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        if check.now is not None:
            mask = check.now.note(pointers, mask, self.grid_idx[0], False)
        return load(self, pointers, mask, *rest)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        if check.now is not None:
            mask = check.now.note(pointers, mask, self.grid_idx[0], True)
        return store(self, pointers, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store
    PreparedLaunch.start = lambda self, *args: check.watched(start, self, *args)  # type: ignore[method-assign]
    kernel_launch._Bound.fill = lambda self, *args: check.arguments(fill, self, *args)  # type: ignore[method-assign]
    kernel_launch.data_ptr = check.table  # type: ignore[assignment]
    return check


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the sources of kernels")
    parser.add_argument("--every", type=int, default=1, help="so many-th sample only")
    parser.add_argument("--only", default="", help="of this rule only")
    parser.add_argument("--replace", nargs=2, help="in the text of each kernel, to see that a mistake is found")
    parser.add_argument("--out", type=Path, default=Path("memory-check.jsonl"), help="a line of JSON for each rule and dtype")
    options = parser.parse_args(given)
    from kitsune.codegen import Compiler
    from tests.codegen import interpret
    from tests.codegen.samples import SAMPLES, draw

    class Changed(Compiler):
        def compile(self, program: Program, *rest: Any) -> Any:
            return super().compile(replace(program, text=program.text.replace(*options.replace or ("", ""))), *rest)

    check, compiler, wrong = watch(), Changed(options.folder, interpret=True), 0
    with options.out.open("w") as file:
        for sample in [sample for sample in SAMPLES if options.only in ("", sample.rule)][:: options.every]:
            for dtype in sample.dtypes if sample.rule not in interpret.OTHER_ON_CPU else ():
                before, known, crashed = check.n_launches, len(check.found), []
                for size in SIZES:
                    inputs = draw(sample, dtype, (size,))
                    first, *others = draw(sample, dtype, (3, size))
                    crossed = [first, *(t.t().contiguous().t() for t in others)]
                    for tensors in (inputs, crossed) if interpret.supported(sample, inputs) else ():
                        try:
                            interpret.compare(sample.rule, sample.call, tensors, compiler, sample.moving)
                        except Exception as error:
                            crashed.append(f"{size}: {type(error).__name__}: {error}"[:300])
                run, told = check.n_launches - before, check.found[known:]
                row = {"entry": sample.rule, "part": str(dtype), "run": run + len(crashed), "equal": run - len(told)}
                row |= {"different": len(told), "crashed": len(crashed), "told": [*told, *crashed][:5]}
                file.write(json.dumps(row) + "\n")
                wrong += len(told) + len(crashed)
                print("".join(f"{sample.rule} {dtype}: {words}\n" for words in row["told"]), end="")
    print(f"{check.n_launches} launches, {wrong} of them wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
