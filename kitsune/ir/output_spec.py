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
    # Mostly it is one tensor.
    for k, operand in enumerate(operands):
        if operand is result:
            return OutputSpec((), Operand(k)), []
    places: dict[int, int] = {}
    if not isinstance(result, torch.Tensor):
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
