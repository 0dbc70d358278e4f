"""Walks over arguments and results: nested lists, tuples and dicts of tensors and constants."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from kitsune.ir import Operand, Result, TensorType
from kitsune.lazy.cell import Cell, Ref
from kitsune.lazy.edges import begin_of

# What has no tensor in it, told by its type: to ask whether a number is a tensor takes longer than whether it is a number.
ATOMS = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format})


def tensors_in(tree: Any) -> list[Any]:
    """The tensors of a tree, in order."""
    found: list[Any] = []
    _collect(tree if type(tree) is tuple else (tree,), found)
    return found


def _collect(trees: Iterable[Any], found: list[Any]) -> None:
    for x in trees:
        cls = type(x)
        if cls in ATOMS:
            continue
        if cls is list or cls is tuple:
            _collect(x, found)
        elif isinstance(x, torch.Tensor):
            found.append(x)
        elif isinstance(x, dict):
            _collect(x.values(), found)
        elif isinstance(x, (list, tuple)):
            _collect(x, found)


def replace_tensors(tree: Any, by_id: dict[int, Any]) -> Any:
    """The tree with each tensor that `by_id` knows replaced."""
    cls = type(tree)
    if cls is list or isinstance(tree, tuple):
        parts = [
            known if (known := by_id.get(id(x))) is not None else x if type(x) in ATOMS else replace_tensors(x, by_id)
            for x in tree
        ]
        # Also a named tuple, or one of torch.return_types.
        return parts if cls is list else cls(parts)
    if isinstance(tree, dict):
        return {name: replace_tensors(x, by_id) for name, x in tree.items()}
    return by_id.get(id(tree), tree)


def fill(structure: Any, results: Sequence[Any], operands: Sequence[Any]) -> Any:
    """A return value from its structure."""
    if isinstance(structure, Result):
        return results[structure.index]
    if isinstance(structure, Operand):
        return operands[structure.index]
    if isinstance(structure, (list, tuple)):
        return type(structure)(fill(x, results, operands) for x in structure)
    return structure


def without_numbers(key: Any, cells: list[Cell]) -> Any:
    """A call's key with the operands' types, and which of them share memory and how they lie there, in place of their numbers in
    the region."""
    storages = [cell.storage for cell in cells]
    pattern = tuple((storages.index(s), storages.count(s) > 1 and _begin(c)) for s, c in zip(storages, cells, strict=True))
    return (_anonymous(key), tuple(cell.type for cell in cells), pattern)


def _begin(cell: Cell) -> int:
    return begin_of(cell.real) if cell.external else cell.type.offset


def _anonymous(key: Any) -> Any:
    if isinstance(key, (Ref, TensorType)):
        return Ref
    if isinstance(key, tuple):
        if len(key) == 2 and isinstance(key[0], TensorType):
            return Ref
        return tuple(_anonymous(k) for k in key)
    return key
