"""Values that are the same in every step, since they are made of nothing but constants: reading one need not end the region.

Models ask such questions of positions that they have just counted (are these sequences packed?).
"""

from typing import Any

import torch

from kitsune.ir import Kind, OpRow, reads_slots
from kitsune.lazy.cell import Ref
from kitsune.lazy.region import Region
from kitsune.lazy.tensor import LazyTensor
from kitsune.lazy.trie import Node

# Operators behind such a value, and the bytes of their results: more are worth no memory.
MAX_OPS, MAX_BYTES = 64, 1 << 20
UNKNOWN, MOVES = object(), object()


def constant(region: Region, row: OpRow, args: Any, kwargs: Any) -> Any:
    """What a read of one tensor gives, where that is known without running the region: else UNKNOWN, or MOVES for good."""
    tensor = args[0] if len(args) == 1 and not kwargs else None
    if type(tensor) is not LazyTensor or tensor.cell.region is not region or tensor.cell.external:
        return MOVES
    node, cell = region.node, tensor.cell
    found = node.constants.get((row, cell.ref), UNKNOWN)
    if found is UNKNOWN and not _is_constant(node, cell.ref, region.dirty, cell.storage):
        found = node.constants[row, cell.ref] = MOVES
    if found is UNKNOWN and cell.real is not None:
        with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction(), torch.no_grad():
            found = node.constants[row, cell.ref] = row.target(cell.real)
    return found


def _is_constant(node: Node, value: Ref, dirty: set[int], storage: int) -> bool:
    """Is the value made by pure operators, of nothing that comes in?"""
    needed, n_ops, nbytes = {value.id}, 0, 0
    at: Node | None = node
    while needed and at is not None and at.row is not None:
        made = {number.id: type_.nbytes for number, type_, _ in at.results}
        if not needed.isdisjoint(made):
            n_ops, nbytes = n_ops + 1, nbytes + sum(made.values())
            storages = {storage for *_, storage in at.results}
            if n_ops > MAX_OPS or nbytes > MAX_BYTES or not _is_pure(at.row) or not dirty.isdisjoint(storages):
                return False
            if at.op is None or reads_slots(at.op):
                return False
            needed -= made.keys()
            needed |= {value.id for value in at.op.inputs}
        at = at.parent
    return not needed and storage not in dirty


def _is_pure(row: OpRow) -> bool:
    fills = row.kind in (Kind.POINTWISE, Kind.REDUCTION, Kind.VIEW) or row.trusted
    # Memory that nobody has written yet holds something else each time.
    return fills and not row.random and not row.writes and row.kind is not Kind.GEMM and "empty" not in str(row.target)
