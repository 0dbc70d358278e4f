"""What a call that is followed does to its region: it lets tensors in, writes to some, and makes placeholders; and what an op
does that lets a wrapper in."""

from typing import Any

import torch

from kitsune.lazy.cell import Cell, is_leaf
from kitsune.lazy.derived import derive
from kitsune.lazy.edges import Edge, Made, cell_in
from kitsune.lazy.tensor import LazyTensor

# In an op's key, before that of a wrapper which wants a gradient.
GRADED = "graded"


def adopt(region: Any, wrapper: LazyTensor) -> Any:
    """A wrapper that is new to the region comes in; returns its key."""
    if wrapper.cell.owed is None and wrapper.requires_grad and is_without_history(wrapper):
        # A leaf that was made in a context, of which backwards that are followed know nothing. Nor do the keys of calls behind
        # this op, which may be one without gradients.
        region.real, region.past = True, None
    key = region.adopt(wrapper.cell)
    # Looked at under no_grad: calls behind this op, which may be one with gradients, take it for a value of the region, and what
    # they do with a history is not what they do without one. (What lets it in for a graph says so in the region, and a backward
    # has its own.)
    looks = not torch.is_grad_enabled() and wrapper.requires_grad and not region.real
    return (GRADED, key) if looks and torch._C._current_graph_task_id() < 0 else key


def is_without_history(wrapper: Any) -> bool:
    """Is this wrapper a leaf?"""
    # Of a view whose base has a gradient, to ask would have autograd take it again.
    base = wrapper._base
    return (base is None or not base.requires_grad) and is_leaf(wrapper)


def arrive(region: Any, edge: Edge, fresh: list[tuple[int, Any]], flat: Any = ()) -> None:
    """Let the tensors in that a call brings along, (serial of the storage, tensor) of each, and views of all that it has."""
    plain, inputs, storages = region.plain, region.inputs, region.storages
    for k, number, type_, storage, graded in edge.arrivals:
        serial, tensor = fresh[k]
        storages[serial] = storage
        if type(tensor) is LazyTensor:
            cell = tensor.cell
            inputs.append((number.id, cell.real))
            cell.region, cell.ref, cell.storage = region, number, storage
            cell.external, cell.came = True, number
        else:
            plain[id(tensor)] = Cell(region, number, type_, storage, tensor, number)
            if graded:
                region.recorder.leaves.note(tensor)
    if edge.derived:
        derive(region, edge.derived, flat)


def rewrite(region: Any, edge: Edge, flat: list[Any]) -> None:
    """Let the tensors that a call writes stand for what they are afterwards."""
    for k, after in edge.rewrites:
        cell = cell_in(flat[k], region)
        assert cell is not None
        cell.ref = after
    region.dirty |= edge.dirty


def place(region: Any, made: Made, wrapper: LazyTensor) -> LazyTensor:
    """Let a wrapper stand for what a call has made, a new one unless the call has turned it."""
    if made.turned is not None:
        wrapper.cell.owed = made
        return wrapper
    wrapper.cell = cell = Cell(region, made.ref, made.type, made.storage)
    if made.graded is not None:
        cell.owed = made
    region.produced.append(cell)
    return wrapper
