"""What a call returned, with its tensors replaced by what is known of them."""

from collections.abc import Callable
from typing import Any

import torch

from kitsune.ir.graph import Operand, OutputSpec, Result
from kitsune.ir.tensor_type import TensorType, storage_of


def describe_result(result: Any, operands: list[torch.Tensor], type_of: Callable[[torch.Tensor], TensorType]) -> OutputSpec:
    """The OutputSpec of a call that was made on `operands` and gave `result`."""
    owners = {storage_of(t)._cdata: k for k, t in reversed(list(enumerate(operands)))}
    places = {id(t): k for k, t in reversed(list(enumerate(operands)))}
    results: list[tuple[TensorType, int | None]] = []

    def visit(leaf: Any) -> Any:
        if isinstance(leaf, (list, tuple)):
            return [visit(x) for x in leaf] if isinstance(leaf, list) else tuple(visit(x) for x in leaf)
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if id(leaf) in places:
            return Operand(places[id(leaf)])
        storage = storage_of(leaf)._cdata
        results.append((type_of(leaf), owners.get(storage)))
        owners.setdefault(storage, -len(results))
        return Result(len(results) - 1)

    return OutputSpec(structure=visit(result), results=tuple(results))
