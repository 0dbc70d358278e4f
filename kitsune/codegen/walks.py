"""How the text of a kernel reaches an operand: by the index itself, by one address, or by strides over its domain."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from kitsune.ir.plan import Access, Kernel, Step, Store

LINEAR = "linear"
ONE = "one"


@dataclass(frozen=True, slots=True)
class Walk:
    """The form of an access: `kind` is LINEAR, ONE, or for each dimension that counts 0, 1 or None, a stride to be passed."""

    kind: str | tuple[int | None, ...]


@cache
def counted(domain: tuple[int, ...]) -> tuple[int, ...]:
    """The dimensions of a domain that have more than one element, or none."""
    return tuple(d for d, size in enumerate(domain) if size != 1)


@cache
def _contiguous(domain: tuple[int, ...]) -> tuple[int, ...]:
    strides, expected = [], 1
    for d in reversed(counted(domain)):
        strides.append(expected)
        expected *= max(domain[d], 1)
    return tuple(reversed(strides))


@cache
def walk(domain: tuple[int, ...], strides: tuple[int, ...]) -> Walk:
    """The form of an access with these strides."""
    counting = tuple(strides[d] for d in counted(domain))
    if counting == _contiguous(domain):
        return Walk(LINEAR)
    if not any(counting):
        return Walk(ONE)
    return Walk(tuple(s if s in (0, 1) else None for s in counting))


# Of a part of a domain, rows or columns: 0 where an access does not move along it, the step between neighbours where they are
# evenly spaced (1, "columns" for the length of a row, None for a stride to be passed), else for each dimension 0, 1 or None.
Part = int | str | None | tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class TileWalk:
    """The form of an access of a kernel with reductions."""

    rows: Part
    columns: Part


@cache
def tile_walk(domain: tuple[int, ...], reduced: int, strides: tuple[int, ...]) -> TileWalk:
    """The form of an access with these strides."""
    cut = len(domain) - reduced
    rows, columns = _part(domain[:cut], strides[:cut]), _part(domain[cut:], strides[cut:])
    whole = type(rows) is int and rows > 1 and rows == math.prod(domain[cut:])
    return TileWalk("columns" if whole else _passed(rows), _passed(columns))


def form_of(kernel: Kernel, access: Access) -> TileWalk:
    """The form of an access of a kernel with reductions; what a turn adds to it is told apart."""
    return tile_walk(kernel.domain[kernel.first :], kernel.reduced, access.strides[kernel.first :])


def _passed(part: int | tuple[int | None, ...]) -> Part:
    return None if type(part) is int and part > 1 else part


def _part(domain: tuple[int, ...], strides: tuple[int, ...]) -> int | tuple[int | None, ...]:
    counting = tuple(strides[d] for d in counted(domain))
    if not any(counting):
        return 0
    if all(s == counting[-1] * c for s, c in zip(counting, _contiguous(domain), strict=True)):
        return counting[-1]
    return tuple(s if s in (0, 1) else None for s in counting)


def coordinates(
    index: str, name: str, rest_name: str, needed: set[int], n_dims: int, size: Callable[[int], str]
) -> Iterator[str]:
    """The lines that take a linear index apart into `name`0, `name`1 and so on, as far as they are needed."""
    rest = index
    for position in range(n_dims - 1, -1, -1):
        if position == 0:
            yield f"{name}0 = {rest}"
        elif any(p <= position for p in needed):
            n = size(position)
            if position in needed:
                yield f"{name}{position} = {rest} % {n}"
            if not any(p < position for p in needed):
                return
            yield f"{rest_name}{position} = {rest} // {n}"
            rest = f"{rest_name}{position}"


def operands_by_value(step: Step) -> dict[int, Any]:
    """Where each operand's content is, by value number; an operand listed twice may be read in one place only."""
    found: dict[int, Any] = {}
    for value, operand in zip(step.op.inputs, step.operands, strict=True):
        if operand is not None or value.id not in found:
            found[value.id] = operand
    return found


def is_read(kernel: Kernel, store: Store) -> bool:
    """Does the kernel read memory that it writes here?"""
    return any(access.value.storage == store.access.value.storage for access in kernel.loads)


def accesses(kernel: Kernel) -> tuple[Access, ...]:
    """Loads, then stores: the order in which Pointer and Stride count them."""
    return (*kernel.loads, *(store.access for store in kernel.stores))


def walks(kernel: Kernel) -> Iterator[Walk]:
    """The form of each access."""
    return (walk(kernel.domain, access.strides) for access in accesses(kernel))
