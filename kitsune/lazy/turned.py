"""Tensors without a history that get one from a call that writes them: zeros to which messages between nodes are added, a buffer
that is filled step by step. They stay the tensors that they are, and from there on are owed a place in the graph."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from kitsune.lazy.edges import Edge, Made, cell_in, history_of
from kitsune.lazy.tensor import LazyTensor, wrapper_maker
from kitsune.lazy.trie import Node


def turned_by(positions: Sequence[int], flat: Sequence[Any], start: Node, region: Any) -> list[Made] | None:
    """What a call from the node `start` on has made of tensors at these positions; None where others may share their memory."""
    made: list[Made] = []
    if not positions:
        return made
    known = Counter[int]()
    for node in start.path():
        known.update([storage for *_, storage in node.results])
        known.update([value.storage for value in node.entered])
    for k in positions:
        tensor, cell = flat[k], cell_in(flat[k], region)
        if type(tensor) is not LazyTensor or cell is None or cell.external or known[cell.storage] != 1 or tensor.is_leaf:
            return None
        maker = wrapper_maker(cell.type)
        made.append(Made(cell.ref, cell.type, cell.storage, maker, history_of(tensor), turned=k))
    return made


def fresh(edge: Edge, made: Iterable[Any]) -> list[Any]:
    """What is new of what a call has made."""
    return [t for one, t in zip(edge.made, made, strict=True) if one.turned is None]


def turn_back(calls: Iterable[Any]) -> None:
    """The calls that have turned tensors are about to be made again: the tensors are what they were given, and what they have
    counted of writes since they were turned is counted as these are made."""
    tensors: dict[int, Any] = {}
    counts = Counter[int]()
    for call in calls:
        tensors.update({id(t): t for one, t in zip(call.edge.made, call.made, strict=True) if one.turned is not None})
        counts.update([number for k in call.edge.bumps if (number := id(call.flat[k])) in tensors])
    for number, tensor in tensors.items():
        tensor.cell.owed = None
        # A wrapper of what the program had dropped has counted nothing.
        torch._C._autograd._unsafe_set_version_counter((tensor,), (max(tensor._version - counts[number], 0),))
