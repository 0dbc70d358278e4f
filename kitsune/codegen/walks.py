"""How the text of a kernel reaches an operand: by the index itself, by one address, or by strides over its domain."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from kitsune.ir.plan import Access, Kernel, Pointer, Scalar, Size, SlotAddress, Stride

Parameter = Pointer | Size | Stride | Scalar | SlotAddress

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


def accesses(kernel: Kernel) -> tuple[Access, ...]:
    """Loads, then stores: the order in which Pointer and Stride count them."""
    return (*kernel.loads, *(store.access for store in kernel.stores))


def walks(kernel: Kernel) -> Iterator[Walk]:
    """The form of each access."""
    return (walk(kernel.domain, access.strides) for access in accesses(kernel))
