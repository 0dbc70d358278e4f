"""What a call returned, with its tensors replaced by what is known of them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from kitsune.ir.graph import Operand, OutputSpec, Result
from kitsune.ir.tensor_type import TensorType, storage_of


def describe_result(
    result: Any, operands: Sequence[torch.Tensor], type_of: Callable[[torch.Tensor], TensorType]
) -> tuple[OutputSpec, list[torch.Tensor]]:
    """The OutputSpec of a call that was made on `operands` and gave `result`, and the tensors in it that are new."""
    new: list[torch.Tensor] = []
    places: dict[int, int] = {}
    for k, operand in enumerate(operands):
        places.setdefault(id(operand), k)
    structure = _structure(result, places, new)
    if not new:
        return OutputSpec((), structure), new
    owners: dict[int, int] = {}
    for k, operand in enumerate(operands):
        owners.setdefault(storage_of(operand)._cdata, k)
    results: list[tuple[TensorType, int | None]] = []
    for tensor in new:
        storage = storage_of(tensor)._cdata
        results.append((type_of(tensor), owners.get(storage)))
        owners.setdefault(storage, -len(results))
    return OutputSpec(tuple(results), structure), new


def _structure(leaf: Any, places: dict[int, int], new: list[torch.Tensor]) -> Any:
    """The return value with numbers for tensors; those that are no operands, whose `places` are known by id, join `new`."""
    if isinstance(leaf, torch.Tensor):
        if (k := places.get(id(leaf))) is not None:
            return Operand(k)
        new.append(leaf)
        return Result(len(new) - 1)
    if isinstance(leaf, (list, tuple)):
        parts = [_structure(x, places, new) for x in leaf]
        return parts if isinstance(leaf, list) else tuple(parts)
    return leaf
