"""Inputs of a region that torch itself has made of what a call was given: attention adds a dimension to its mask, `einsum` turns
its operand. They are views, taken beside the region (see `views.py`); where the call is followed, they are taken again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from kitsune.ir import TensorType
from kitsune.lazy.cell import Cell, Ref, serial_of

if TYPE_CHECKING:
    from kitsune.lazy.trie import Node

Given = Mapping[int, Any]
_as_strided: Any = torch._C.TensorBase.as_strided
_storage_offset: Any = torch._C.TensorBase.storage_offset


class Derived(NamedTuple):
    """A view of the call's tensor at `position`, which begins `begin` elements behind that; and what it is in the region. Of a
    backward, which views what the calls before it were given, `position` is the number of the region's value."""

    position: int
    begin: int
    ref: Ref
    type: TensorType
    storage: int


def derived_of(lacking: set[int], path: Sequence[Node], given: Given, region: Any) -> tuple[Derived, ...] | None:
    """How the values `lacking` that came in were made of the tensors `given`; None if one of them was not, or is written."""
    cells = {cell.came.id: cell for cell in region.plain.values() if cell.came.id in lacking}
    dirty = {storage for node in path for *_, storage in node.written}
    found = []
    # Some of what is asked here ends a region where the program asks it.
    with torch._C.DisableTorchFunction():
        for number in sorted(lacking):
            cell = cells.get(number)
            if cell is None or cell.storage in dirty or (position := _source(cell.real, given)) is None:
                return None
            begin = _storage_offset(cell.real) - _storage_offset(given[position])
            found.append(Derived(position, begin, cell.came, cell.type, cell.storage))
    return tuple(found)


def given_before(region: Any, first: int) -> dict[int, Any]:
    """The plain tensors that came in before value `first`, by number."""
    return {cell.came.id: cell.real for cell in region.plain.values() if cell.came.id < first}


def _source(view: Any, given: Given) -> int | None:
    """The first of these that a plain tensor is a view of, by memory and type."""
    if type(view) is not torch.Tensor or view.requires_grad or not view._is_view():
        return None
    for position in sorted(given):
        tensor = given[position]
        if type(tensor) is not torch.Tensor or tensor.requires_grad or tensor.dtype is not view.dtype:
            continue
        if tensor.layout is not torch.strided or tensor.is_nested:
            continue
        if serial_of(tensor) == serial_of(view) and (tensor.is_conj(), tensor.is_neg()) == (view.is_conj(), view.is_neg()):
            return position
    return None


def derive(region: Any, derived: Sequence[Derived], given: Given | Sequence[Any]) -> None:
    """Let the views of a call's tensors in."""
    with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
        for position, begin, ref, type_, storage in derived:
            base = given[position]
            view = _as_strided(base, type_.shape, type_.stride, _storage_offset(base) + begin)
            region.storages[serial_of(base)] = storage
            region.plain[id(view)] = Cell(region, ref, type_, storage, view, ref)


def views_of(region: Any, derived: Sequence[Derived]) -> list[Cell]:
    """The cells of views that were taken when a call was followed."""
    cells = {cell.came.id: cell for cell in region.plain.values()} if derived else {}
    return [cells[one.ref.id] for one in derived if one.ref.id in cells]


def take_again(region: Any, cells: Sequence[Cell], made: Any) -> None:
    """The call is made again, and takes such views anew, which autograd may keep: a backward is to find in them what came in."""
    with torch._C.DisableTorchFunction():
        for view in made if isinstance(made, (list, tuple)) else [made]:
            cell = next((cell for cell in cells if _lies_like(cell.real, view)), None)
            if cell is not None and cell.came is not None:
                region.plain[id(view)] = Cell(region, cell.came, cell.type, cell.storage, view, cell.came)


def _lies_like(a: Any, b: Any) -> bool:
    same = serial_of(a) == serial_of(b) and a.dtype is b.dtype and (a.is_conj(), a.is_neg()) == (b.is_conj(), b.is_neg())
    return same and (a.shape, a.stride(), _storage_offset(a)) == (b.shape, b.stride(), _storage_offset(b))
