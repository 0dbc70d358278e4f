"""Ops as text, and why some stay with the library."""

from collections.abc import Hashable
from typing import Any

import torch

import kitsune.codegen.rules  # noqa: F401 -- fills the table
from kitsune.codegen.dtypes import HALF, SUPPORTED, cast
from kitsune.codegen.lowering import Lowering, NotLowered, Reduce, base_name, lower_rules
from kitsune.ir import Kind, Op, Slot, Value, reduction_of

# Not pointwise by their kind, for they have no operands, but written by a kernel all the same.
FACTORIES = frozenset("scalar_tensor full zeros ones new_full new_zeros new_ones".split())

# Over windows of an image: not by rules, but each with a text of its own.
WINDOWED = frozenset(("max_pool2d_with_indices", "max_pool2d_with_indices_backward"))


def lower(
    op: Op,
    registers: dict[int, str],
    scalar_name: Any,
    let: Any,
    used: set[str],
    reducer: Reduce | None = None,
    rounds: bool = True,
) -> tuple[str, ...]:
    """Texts for the op's outputs, as values of the outputs' dtypes, or wide ones unless it `rounds`. Raises NotLowered."""
    rule = lower_rules[base_name(op)]
    lowering = Lowering(op, rule, registers, scalar_name, let, used, reducer, rounds)
    texts = rule.lower(lowering)
    texts = texts if isinstance(texts, tuple) else (texts,)
    source = torch.bool if rule.boolean else lowering.common if rule.exact else lowering.compute
    dtypes = [lowering.kept(v.type.dtype) for v in op.outputs]
    return tuple(_as(t, getattr(t, "dtype", source), dtype, used) for t, dtype in zip(texts, dtypes, strict=True))


def _as(text: str, source: torch.dtype, target: torch.dtype, used: set[str]) -> str:
    # Parentheses only where something is called on the text.
    if cast("x", source, target, used) == "x":
        return text
    is_operand = target in HALF and (source in HALF or source is torch.float32)
    return cast(text if is_operand else _atom(text), source, target, used)


def _atom(text: str) -> str:
    """In parentheses, unless a method can be called on it as it is: a name, or one call."""
    name, parenthesis, rest = text.partition("(")
    if not parenthesis:
        return text if text.isidentifier() else f"({text})"
    depth = 1
    for i, character in enumerate(rest):
        depth += (character == "(") - (character == ")")
        if not depth:
            return text if i == len(rest) - 1 and (not name or name.replace(".", "").isidentifier()) else f"({text})"
    return f"({text})"


def why_not_lowered(op: Op) -> str | None:
    """A sentence saying why an op cannot be put into a kernel; None if it can."""
    form = _form(op)
    try:
        return _known[form]
    except TypeError:  # an argument that cannot be a part of a key
        return _why_not_lowered(op)
    except KeyError:
        if len(_known) >= MAX_KNOWN:
            _known.clear()
        reason = _known[form] = _why_not_lowered(op)
        return reason


# Found out by lowering it: ResNet-50's plan asks 8,000 times, of 900 forms.
_known: dict[Hashable, str | None] = {}
MAX_KNOWN = 4096


def _form(op: Op) -> Hashable:
    """What is to be known of an op to say whether it can be lowered: all but which tensors it is about."""
    arguments = tuple(map(_form_of_argument, op.args)), tuple([(name, _form_of_argument(a)) for name, a in op.kwargs])
    written = tuple([after.type for _, after in op.rewritten])
    types = tuple([v.type for v in op.inputs]), tuple([v.type for v in op.results]), written
    return op.target, op.kind, op.effects.random, arguments, types, torch.get_default_dtype()


def _form_of_argument(a: Any) -> Hashable:
    cls = type(a)
    if cls is Value:
        return a.type
    if cls is Slot:
        return Slot
    # 1 is another argument than 1.0 and True.
    return (cls, tuple(map(_form_of_argument, a))) if cls in (tuple, list) else (cls, a)


def _why_not_lowered(op: Op) -> str | None:
    if op.kind is Kind.WINDOW:
        return None if op.target._opname in WINDOWED else f"{op.target} is over windows, and no kernel is written for it"
    if op.kind is Kind.REDUCTION:
        if reduction_of(op) is None:
            return f"{op.target} reduces in a way that no kernel is written for"
    elif op.kind is not Kind.POINTWISE and base_name(op) not in FACTORIES:
        return f"{op.target} is not pointwise"
    if base_name(op) not in lower_rules:
        return f"{op.target} has no lowering rule"
    if op.effects.random:
        return f"{op.target} draws random numbers"
    return _why_not_typed(op) or _why_not_ruled(op)


def _why_not_typed(op: Op) -> str | None:
    outputs = op.outputs
    if not outputs:
        return f"{op.target} computes nothing that could be stored"
    device = outputs[0].type.device
    for value in (*op.inputs, *outputs):
        t = value.type
        if t.dtype not in SUPPORTED:
            return f"{op.target} works on {t.dtype}, which no kernel is written for"
        if t.conj or t.neg:
            return f"{op.target} works on a tensor that is conjugated or negated only in name"
        if t.device != device:
            return f"{op.target} works on tensors of two devices"
    if any(type(a) is tuple and len(a) > 1 and type(a[0]) not in (int, bool) for a in (*op.args, *(a for _, a in op.kwargs))):
        return f"{op.target} works on a list of several tensors, which is to be taken apart first"
    return None


def _why_not_ruled(op: Op) -> str | None:
    registers = {v.id: "x" for v in op.inputs}
    try:
        lower(op, registers, lambda scalar: "s", lambda text: "t", set(), lambda kind, dtype, text: ("a", "b"))
    except NotLowered as refusal:
        return str(refusal)
    return None
