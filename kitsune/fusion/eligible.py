"""Which ops may be part of a kernel at all."""

from collections.abc import Callable

from kitsune.fusion.members import base_name
from kitsune.ir import Kind, Op, TensorType


def why_not_fusible(op: Op, why_not_lowered: Callable[[Op], str | None]) -> str | None:
    """Why an op cannot be part of any kernel."""
    if op.kind not in (Kind.POINTWISE, Kind.REDUCTION, Kind.WINDOW):
        return f"{base_name(op)} is {op.kind.name.lower()}"
    if not op.outputs or op.effects.random:
        return f"{base_name(op)} draws random numbers" if op.effects.random else f"{base_name(op)} makes no tensor"
    if not op.outputs[0].type.nbytes or (op.kind is Kind.REDUCTION and not op.inputs[0].type.nbytes):
        return "it has no elements"
    if len(set(op.effects.writes)) < len(op.effects.writes):
        return "it writes one tensor's memory twice"
    if any(_overlaps(after.type) for after in op.outputs):
        return "its result has several elements at one address"
    return why_not_lowered(op)


def _overlaps(type_: TensorType) -> bool:
    if type_.canonical:
        return False
    needed = 1
    for stride, size in sorted((s, n) for n, s in zip(type_.shape, type_.stride, strict=True) if n > 1):
        if stride < needed:
            return True
        needed = stride * size
    return False
