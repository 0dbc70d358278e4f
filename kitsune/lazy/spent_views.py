"""Views whose graph a followed backward has used up. One of a leaf is still that, and autograd lets nobody write it."""

from typing import Any

import torch

from kitsune.ir import Value
from kitsune.lazy.cell import Cell, Moved, serial_of
from kitsune.lazy.edges import Edge, path_between
from kitsune.lazy.rebuild import fill, tensors_in
from kitsune.lazy.tensor import LazyTensor, wrap
from kitsune.lazy.trie import Node


class Retaken:
    """Takes the views as they are taken again."""

    def __init__(self, recorder: Any, nodes: list[Node]) -> None:
        self._recorder, self._nodes = recorder, iter(nodes)

    def take(self, row: Any, tensors: list[Any]) -> Any:
        """The results of a view."""
        node = next(self._nodes)
        cells = [Cell(self._recorder.region, ref, type_, storage) for ref, type_, storage in node.results]
        return fill(node.structure, [wrap(cell) for cell in cells], tensors)


def view_again(recorder: Any, tensor: LazyTensor, leaves: list[Any]) -> bool:
    """Let a wrapper be the view of a leaf that it was when it was made; False if it was none."""
    origin: Any = leaves if isinstance(leaves, Moved) else tensor.cell
    memory = [leaf for leaf in leaves if origin.region.storages.get(serial_of(leaf)) == origin.storage]
    if len(memory) != 1 or not memory[0].requires_grad:
        # Of several leaves in one memory it is not known which.
        return False
    made, nodes = memory[0], _views_to(origin)
    # Mostly calls are being made again, and one of them is given this view: those behind it are, too.
    walk, recorder.walk = recorder.walk, Retaken(recorder, nodes)
    try:
        for k, node in enumerate(nodes, 1):
            op: Any = node.op
            results = op.target(*_filled(op.args, made), **{name: _filled(a, made) for name, a in op.kwargs})
            number = nodes[k].op.inputs[0].id if k < len(nodes) else origin.ref.id  # type: ignore[union-attr]
            made = tensors_in(results)[[ref.id for ref, *_ in node.results].index(number)]
        torch._C._swap_tensor_impl(tensor, made)
    except RuntimeError:
        # Somebody else refers to it.
        return False
    finally:
        recorder.walk = walk
    return True


def _filled(tree: Any, made: Any) -> Any:
    if isinstance(tree, Value):
        return made
    return tuple(_filled(part, made) for part in tree) if isinstance(tree, tuple) else tree


def _views_to(origin: Any) -> list[Node]:
    """The views that lead to what a cell stands for from a leaf whose memory it has."""
    nodes: list[Node] = []
    number, node = origin.ref.id, origin.region.node
    while node is not None:
        if any(ref.id == number for ref, *_ in node.results):
            nodes.append(node)
            number = node.op.inputs[0].id
        node = node.parent
    nodes.reverse()
    return nodes


def written_views(edge: Edge) -> list[int]:
    """The tensors that a call writes, where autograd takes views of them again: not of one whose graph is used up, which is none
    for it any more."""
    path = path_between(edge.start, edge.node) if edge.rewrites else None
    return [k for k, _ in edge.rewrites] if any(node.row is not None and node.row.is_view for node in path or ()) else []
