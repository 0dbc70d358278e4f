"""Which dimensions an op reduces: a row for each op that does, with what it works on and how its operands lie along it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any

import torch

from kitsune.ir.graph import Kind, Op, Value


@dataclass(frozen=True, slots=True)
class Reduction:
    """An op works on `shape` and reduces `dims` of it, ascending; each result has the whole shape or what is left of it.

    An operand lies along the last dimensions of the shape but for those of `along`, by position in `Op.inputs`. A `positional`
    op has positions in the one reduced dimension as operands or results.
    """

    shape: torch.Size
    dims: tuple[int, ...]
    positional: bool = False
    along: Mapping[int, tuple[int, ...]] = field(default_factory=dict)


def reduction_of(op: Op) -> Reduction | None:
    """What an op reduces; None for one that does not, or not in a way that is known here."""
    return _reduction_of(op) if op.kind is Kind.REDUCTION else None


# A planner asks 25,000 times while it plans ResNet-50, of 900 reductions.
@lru_cache(4096)
def _reduction_of(op: Op) -> Reduction | None:
    if op.rewritten or not op.results:
        return None
    rule = _RULES.get(op.target._opname)
    found = None if rule is None else rule(op, named(op))
    if found is None or not found.dims or not all(_is_result(found, v) for v in op.results):
        return None
    return found


def named(op: Op) -> dict[str, Any]:
    """The op's arguments by name, defaults filled in."""
    names = argument_names(op.target)
    bound = dict(names)
    for (name, _), value in zip(names, op.args, strict=False):
        bound[name] = value
    bound.update(op.kwargs)
    return bound


@cache
def argument_names(target: Any) -> tuple[tuple[str, Any], ...]:
    """(name, default) of each argument of an overload, keyword-only ones last, as in the schema."""
    return tuple((a.name, a.default_value if a.has_default_value() else None) for a in target._schema.arguments)


def left_of(reduction: Reduction, items: Any, keep: Any = None) -> tuple[Any, ...]:
    """Of items for each dimension those that are left; with `keep`, that stands for each that is reduced."""
    kept = keep is not None
    return tuple(keep if d in reduction.dims else item for d, item in enumerate(items) if kept or d not in reduction.dims)


def _is_result(reduction: Reduction, value: Value) -> bool:
    shape = tuple(value.type.shape)
    return shape in (tuple(reduction.shape), left_of(reduction, reduction.shape), left_of(reduction, reduction.shape, 1))


def _dims(n: int, dim: Any) -> tuple[int, ...]:
    """Dimensions as reductions are given them: none, one or several, negative ones from the end."""
    if dim is None or dim == () or dim == []:
        return tuple(range(n))
    return tuple(sorted(d % n for d in (dim if isinstance(dim, (tuple, list)) else (dim,)))) if n else ()


def _plain(op: Op, arguments: dict[str, Any]) -> Reduction | None:
    x = op.inputs[0].type.shape
    return Reduction(x, _dims(len(x), arguments.get("dim"))) if len(op.inputs) == 1 else None


def _position(op: Op, arguments: dict[str, Any]) -> Reduction | None:
    found = _plain(op, arguments)
    # Over several dimensions the position would count in their order, which a kernel chooses as memory lies.
    return Reduction(found.shape, found.dims, True) if found is not None and len(found.dims) == 1 else None


def _extreme(op: Op, arguments: dict[str, Any]) -> Reduction | None:
    return _position(op, arguments) if len(op.results) == 2 else _plain(op, arguments)


def _along_one(op: Op, arguments: dict[str, Any]) -> Reduction | None:
    x = op.inputs[0].type.shape
    return Reduction(x, _dims(len(x), arguments["dim"])) if len(x) else None


def _normalized(op: Op, arguments: dict[str, Any]) -> Reduction | None:
    x = arguments["input"].type.shape
    return Reduction(x, tuple(range(len(x) - len(arguments["normalized_shape"]), len(x))))


def _normalized_backward(op: Op, arguments: dict[str, Any]) -> Reduction | None:
    # The gradients of weight and bias are over the other dimensions.
    return _normalized(op, arguments) if tuple(arguments["output_mask"]) == (True, False, False) else None


def _loss(op: Op, arguments: dict[str, Any]) -> Reduction | None:
    """Of negative log-likelihoods the part that is one number for each row: the one at a position."""
    x, target = arguments["self"], arguments["target"]
    if arguments["weight"] is not None or len(x.type.shape) != 2 or (len(op.results) == 2) or arguments["reduction"] != 0:
        return None
    return Reduction(x.type.shape, (1,), True, {op.inputs.index(target): (0,)})


def _loss_backward(op: Op, arguments: dict[str, Any]) -> Reduction | None:
    x, target, grad = arguments["self"], arguments["target"], arguments["grad_output"]
    if arguments["weight"] is not None or len(x.type.shape) != 2 or len(grad.type.shape):
        return None
    return Reduction(x.type.shape, (1,), True, {op.inputs.index(target): (0,)})


_RULES: dict[str, Callable[[Op, dict[str, Any]], Reduction | None]] = {
    **dict.fromkeys("sum mean amax amin var std var_mean std_mean norm linalg_vector_norm".split(), _plain),
    **dict.fromkeys("max min".split(), _extreme),
    **dict.fromkeys("argmax argmin".split(), _position),
    **dict.fromkeys("_softmax _log_softmax _softmax_backward_data _log_softmax_backward_data".split(), _along_one),
    "logsumexp": _plain,
    "nll_loss_forward": _loss,
    "nll_loss_backward": _loss_backward,
    "native_layer_norm": _normalized,
    "native_layer_norm_backward": _normalized_backward,
}
