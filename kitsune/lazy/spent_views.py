"""Views whose graph a followed backward has used up. One of a leaf is still that, and autograd lets nobody write it."""

from typing import Any

import torch

from kitsune.ir import Kind, Value
from kitsune.lazy.cell import Cell, Moved, serial_of
from kitsune.lazy.edges import Edge, path_between
from kitsune.lazy.rebuild import fill, tensors_in
from kitsune.lazy.region import is_leaf
from kitsune.lazy.tensor import LazyTensor, wrap
from kitsune.lazy.trie import Node


class Retaken:
    """Takes the views as they are taken again, the last of which stands for what the wrapper does."""

    def __init__(self, recorder: Any, nodes: list[Node], held: Cell, born: int) -> None:
        self._recorder, self._nodes, self._held, self._born = recorder, iter(nodes), held, born

    def take(self, row: Any, tensors: list[Any]) -> Any:
        """The results of a view."""
        node = next(self._nodes)
        region = self._recorder.region
        cells = [self._held if ref.id == self._born else Cell(region, ref, type_, at) for ref, type_, at in node.results]
        return fill(node.structure, [wrap(cell) for cell in cells], tensors)


def view_again(recorder: Any, tensor: LazyTensor, leaves: list[Any]) -> bool:
    """Let a wrapper be the view of a leaf that it was when it was made; False if it was none."""
    found = _way_to(leaves if isinstance(leaves, Moved) else tensor.cell, leaves)
    if found is None:
        return False
    made, nodes, born = found
    retaken = Retaken(recorder, nodes, tensor.cell, born)
    recorder.walk = retaken
    try:
        for k, node in enumerate(nodes, 1):
            op: Any = node.op
            results = op.target(*_filled(op.args, made), **{name: _filled(a, made) for name, a in op.kwargs})
            number = nodes[k].op.inputs[0].id if k < len(nodes) else born  # type: ignore[union-attr]
            made = tensors_in(results)[[ref.id for ref, *_ in node.results].index(number)]
        torch._C._swap_tensor_impl(tensor, made)
    except RuntimeError:
        # Somebody else refers to it.
        return False
    finally:
        recorder.walk = None
    return True


def _filled(tree: Any, made: Any) -> Any:
    if isinstance(tree, Value):
        return made
    return tuple(_filled(part, made) for part in tree) if isinstance(tree, tuple) else tree


def _way_to(cell: Cell | Moved, leaves: list[Any]) -> tuple[Any, list[Node], int] | None:
    """The leaf that a value is a view of, the views that lead from it to that, and the value's number as it was made."""
    nodes: list[Node] = []
    number, node = cell.ref.id, cell.region.node
    born = number
    while node is not None:
        for _, old, after, _ in node.written:
            if after.id == number:
                number = old
                born = born if nodes else number
        if any(ref.id == number for ref, *_ in node.results):
            if node.op is None or node.op.kind is not Kind.VIEW:
                return None
            nodes.append(node)
            number = node.op.inputs[0].id
        node = node.parent
    nodes.reverse()
    base: Any = nodes[0].op.inputs[0] if nodes and nodes[0].op is not None else None
    for leaf in leaves if base is not None else ():
        known = cell.region.storages.get(serial_of(leaf)) == cell.storage and leaf.shape == base.type.shape
        if known and leaf.requires_grad and is_leaf(leaf):
            return leaf, nodes, born
    return None


def written_views(edge: Edge) -> list[int]:
    """The tensors that a call writes, where autograd takes views of them again: not of one whose graph is used up, which is none
    for it any more."""
    if not edge.graded or not edge.dirty:
        return []
    path = path_between(edge.start, edge.node) or []
    return [k for k, _ in edge.rewrites] if any(node.row is not None and node.row.is_view for node in path) else []
