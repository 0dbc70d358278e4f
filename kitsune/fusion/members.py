"""What a group consists of: ops, the tensors that they use, and where operands come from."""

from dataclasses import dataclass

import torch

from kitsune.fusion.factors import Layout
from kitsune.ir import Local, Op, Value, reduction_of

# Declares that it writes the gradients (argument 1), but does so only where they are to be unscaled.
KEEPS_GRADIENTS = {"_fused_adam_", "_fused_adamw_", "_fused_sgd_"}


def base_name(op: Op) -> str:
    """The op's name without its overload."""
    name: str = op.target._opname
    return name


def shape_of(op: Op) -> torch.Size:
    """The shape that an op works on: of its first output, or what it reduces."""
    reduction = reduction_of(op)
    return op.outputs[0].type.shape if reduction is None else reduction.shape


def written(op: Op) -> list[tuple[int, Value, Value]]:
    """What an op really writes: output number, value before, value after."""
    first = len(op.results)
    pairs = [(first + k, before, after) for k, (before, after) in enumerate(op.rewritten)]
    if base_name(op) in KEEPS_GRADIENTS:
        gradients = op.args[1]
        pairs = [pair for pair in pairs if pair[1] not in gradients]
    return pairs


@dataclass(frozen=True, slots=True)
class Use:
    """A tensor that the group reads or writes in memory, with the factors that its last dimensions run over."""

    value: Value
    layout: Layout


@dataclass(frozen=True, slots=True)
class Member:
    """An op of the group: where it stands in the graph, and where each of its operands comes from."""

    number: int
    op: Op
    layout: Layout
    operands: tuple[Use | Local | None, ...]
