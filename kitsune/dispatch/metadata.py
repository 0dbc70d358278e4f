"""What a call would return, found by running it on meta tensors: no memory, no kernel, no FakeTensor (1 s at its first op)."""

from typing import Any

import torch
from torch.utils._pytree import tree_map

from kitsune.dispatch.mode import below_autograd
from kitsune.ir import Operand, OutputSpec, TensorType, describe_result, type_of


def infer(func: Any, args: Any, kwargs: Any, operands: list[tuple[TensorType, int]], device: torch.device) -> OutputSpec | None:
    """The OutputSpec of a call in which Operand(k) stands for the k-th operand, or None if meta tensors cannot tell.

    `operands` are types and storages: equal numbers share memory. Any error gives None too: the call is then made for real,
    and raises what eager raises.
    """
    try:
        with below_autograd():
            tensors = _meta_tensors(operands)
            call_args, call_kwargs = tree_map(lambda a: _stand_in(a, tensors), (args, kwargs))
            if "device" in kwargs or not operands:
                call_kwargs["device"] = torch.device("meta")
            result = func(*call_args, **call_kwargs)
    except Exception:
        return None
    return describe_result(result, tensors, lambda t: type_of(t, device))[0]


def _meta_tensors(operands: list[tuple[TensorType, int]]) -> list[torch.Tensor]:
    bases: dict[int, torch.UntypedStorage] = {}
    tensors = []
    for type_, number in operands:
        extent = type_.offset + sum((n - 1) * s for n, s in zip(type_.shape, type_.stride, strict=True)) + 1
        needed = 0 if type_.shape.numel() == 0 else extent * type_.dtype.itemsize
        storage = bases.get(number)
        if storage is None or storage.nbytes() < needed:
            storage = bases[number] = torch.UntypedStorage(needed, device="meta")
        tensor = torch.empty(0, dtype=type_.dtype, device="meta")
        tensor.set_(storage, type_.offset, type_.shape, type_.stride)
        if type_.conj:
            torch._C._set_conj(tensor, True)
        if type_.neg:
            torch._C._set_neg(tensor, True)
        tensors.append(tensor)
    return tensors


def _stand_in(argument: Any, tensors: list[torch.Tensor]) -> Any:
    if isinstance(argument, Operand):
        return tensors[argument.index]
    return torch.device("meta") if isinstance(argument, torch.device) else argument
