"""The out= form of an op, where that form computes straight into the memory that it is given."""

from functools import cache
from typing import Any

import torch
from torch._ops import OpOverload

from kitsune.ir import Kind, Op, Result

# Neither pointwise, reduction nor matrix product, with out= kernels that write their results in place.
LIBRARY = set(
    "cat index index_select gather scatter scatter_add tril triu take glu im2col col2im "
    "avg_pool2d avg_pool2d_backward avg_pool3d avg_pool3d_backward max_pool2d_with_indices max_pool2d_with_indices_backward "
    "adaptive_max_pool2d adaptive_max_pool2d_backward reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d "
    "nll_loss2d_forward nll_loss2d_backward".split()
)
# Their out= kernels make the result elsewhere and copy it.
COPIES = {"all", "any"}
KINDS = {Kind.POINTWISE, Kind.REDUCTION, Kind.GEMM}


def out_form(op: Op) -> OpOverload | None:
    """The overload that computes the op into given memory of the results' types, without a copy; None if there is none.

    Only for new results in the default layout: a kernel may choose strides of its own for any other.
    """
    if op.kind is Kind.VIEW or op.rewritten or op.effects.random or not op.results or not _is_flat(op):
        return None
    name = op.target.overloadpacket.__name__
    if name in COPIES or (op.kind not in KINDS and name not in LIBRARY):
        return None
    if not all(_is_plain(value.type) for value in op.results):
        return None
    device = op.results[0].type.device.type.upper()
    # A build without CUDA knows of no kernels for it; those for the CPU are declared in the same places.
    return _form(op.target, len(op.results), device if device != "CUDA" or torch.backends.cuda.is_built() else "CPU")


def takes_memory(op: Op) -> bool:
    """Can the plan choose where the results of a library call lie?"""
    return op.allocates or out_form(op) is not None


def out_names(form: OpOverload) -> tuple[str, ...]:
    """The arguments of an out= form that take the memory, in the order of its results."""
    return tuple(a.name for a in form._schema.arguments if a.is_out)


def _is_flat(op: Op) -> bool:
    """Does the call return its new tensors one by one, and nothing else?"""
    parts = op.structure if isinstance(op.structure, (list, tuple)) else [op.structure]
    return [p.index if type(p) is Result else None for p in parts] == list(range(len(op.results)))


def _is_plain(type_: Any) -> bool:
    return type_.canonical and not type_.offset and not type_.conj and not type_.neg


@cache
def _form(target: OpOverload, n_results: int, device: str) -> OpOverload | None:
    arguments = _arguments(target)
    for name in target.overloadpacket.overloads():
        form = getattr(target.overloadpacket, name)
        # A form without a kernel for the device is generated: it computes into new memory and copies.
        if (
            len(out_names(form)) == n_results
            and _arguments(form) == arguments
            and torch._C._dispatch_has_kernel_for_dispatch_key(form.name(), device)
        ):
            return form
    return None


def _arguments(target: OpOverload) -> list[tuple[str, str]]:
    return [(a.name, str(a.type)) for a in target._schema.arguments if not a.is_out]
