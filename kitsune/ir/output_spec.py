"""What a call returned, with its tensors replaced by what is known of them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from kitsune.ir.graph import Operand, OutputSpec, Result
from kitsune.ir.tensor_type import TensorType, storage_of

FIRST = Result(0)


def describe_result(
    result: Any, operands: Sequence[torch.Tensor], type_of: Callable[[torch.Tensor], TensorType]
) -> tuple[OutputSpec, list[torch.Tensor]]:
    """The OutputSpec of a call that was made on `operands` and gave `result`, and the tensors in it that are new."""
    if type(result) is torch.Tensor:
        return _describe_one(result, operands, type_of)
    places: dict[int, int] = {}
    for k, operand in enumerate(operands):
        places.setdefault(id(operand), k)
    new: list[torch.Tensor] = []
    structure = _structure(result, places, new)
    owners: dict[int, int] = {}
    for k, operand in enumerate(operands):
        owners.setdefault(storage_of(operand)._cdata, k)
    results: list[tuple[TensorType, int | None]] = []
    for tensor in new:
        storage = storage_of(tensor)._cdata
        results.append((type_of(tensor), owners.get(storage)))
        owners.setdefault(storage, -len(results))
    return OutputSpec(tuple(results), structure), new


def _describe_one(
    result: torch.Tensor, operands: Sequence[torch.Tensor], type_of: Callable[[torch.Tensor], TensorType]
) -> tuple[OutputSpec, list[torch.Tensor]]:
    """The same of a call that gave one tensor, as most do."""
    storage, owner = storage_of(result)._cdata, None
    for k, operand in enumerate(operands):
        if operand is result:
            return OutputSpec((), Operand(k)), []
        if owner is None and storage_of(operand)._cdata == storage:
            owner = k
    return OutputSpec(((type_of(result), owner),), FIRST), [result]


def _structure(result: Any, places: dict[int, int], new: list[torch.Tensor]) -> Any:
    """The return value with numbers for tensors; those that are no operands, whose `places` are known by id, join `new`."""
    if isinstance(result, torch.Tensor):
        if (k := places.get(id(result))) is not None:
            return Operand(k)
        new.append(result)
        return FIRST if len(new) == 1 else Result(len(new) - 1)
    if isinstance(result, (list, tuple)):
        parts = [_structure(x, places, new) for x in result]
        return parts if isinstance(result, list) else tuple(parts)
    return result
