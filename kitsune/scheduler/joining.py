"""Tensors that are joined (`cat`, `stack`), and then copied into another order, are copied once: each part to its final place.

The gradients of queries, keys and values are joined so for one matrix product. What a kernel makes is written there at once.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kitsune.ir import Graph, Kind, Op, TensorType, Value
from kitsune.scheduler.cost import Costs
from kitsune.scheduler.formats import contiguous, with_shape
from kitsune.scheduler.rewriting import Rewriting, Stuck

aten = torch.ops.aten
JOINING = (aten.cat.default, aten.stack.default)


@dataclass(frozen=True, slots=True)
class Join:
    """A joining op, and the copy of its result in another order, if there is one: `order[d]` is dimension d of the copy."""

    op: Op
    copy: Op | None
    order: tuple[int, ...]

    @property
    def dim(self) -> int:
        """The dimension that is joined along."""
        dim = self.op.args[1] if len(self.op.args) > 1 else 0
        return int(dim) % len(self.op.results[0].type.shape)


def joined_in_place(graph: Graph, costs: Costs, why_not_fused: Callable[[Op], str | None]) -> Graph:
    """The graph in which the parts of joined tensors are written where they end up, where that moves fewer bytes."""
    if not any(op.target in JOINING for op in graph.ops):
        return graph
    joins = _Joins(graph, why_not_fused).chosen(costs)
    try:
        return _Joining(graph, joins).rewritten() if joins else graph
    except Stuck:
        return graph


class _Joins:
    def __init__(self, graph: Graph, why_not_fused: Callable[[Op], str | None]) -> None:
        self.graph, self.why_not_fused = graph, why_not_fused
        self._maker = {v.id: op for op in graph.ops for v in op.results}
        self._readers: dict[int, list[Op]] = {}
        for op in graph.ops:
            for storage in {v.storage for v in op.inputs} if op.kind is not Kind.VIEW else ():
                self._readers.setdefault(storage, []).append(op)
        self._seen = {v.storage for v in (*graph.inputs, *graph.outputs)}
        self._written = {storage for op in graph.ops for storage in op.effects.writes}

    def chosen(self, costs: Costs) -> list[Join]:
        """Those for which it pays."""
        found = [self._join(op) for op in self.graph.ops if op.target in JOINING]
        return [join for join in found if join is not None and costs.joining(*self._saved(join))]

    def _join(self, op: Op) -> Join | None:
        (whole,) = op.results
        parts = op.args[0]
        if not whole.type.canonical or not whole.type.nbytes or not all(v.type.shape for v in parts):
            return None
        if {whole.storage, *(v.storage for v in parts)} & self._written or any(v.type.shape.numel() == 0 for v in parts):
            return None
        readers = self._readers.get(whole.storage, [])
        copy = readers[0] if len(readers) == 1 and whole.storage not in self._seen else None
        if copy is not None and copy.target is aten.clone.default and self._is_own(copy.results[0]):
            order = _order(copy.inputs[0].type, whole.type)
            if order is not None and copy.results[0].type is contiguous(copy.results[0].type):
                return Join(op, copy, order)
        return Join(op, None, tuple(range(len(whole.type.shape)))) if self._is_own(whole) else None

    def _is_own(self, value: Value) -> bool:
        return value.storage not in self._seen | self._written

    def _saved(self, join: Join) -> tuple[int, int]:
        """Bytes that need not be moved, and launches that are not made; parts that the library makes are copied one by one."""
        (whole,) = join.op.results
        counts = Counter(v.storage for v in join.op.args[0])
        by_kernel = [v for v in join.op.args[0] if counts[v.storage] == 1 and self._is_fused(v)]
        saved = 2 * sum(v.type.nbytes for v in by_kernel) + (2 * whole.type.nbytes if join.copy is not None else 0)
        return saved, len(by_kernel) + 1 + (join.copy is not None) - len(join.op.args[0])

    def _is_fused(self, part: Value) -> bool:
        """Is a part made by a kernel of ours, for nobody else?"""
        op = self._maker.get(part.id)
        if op is None or op.kind is not Kind.POINTWISE or part.storage in self._seen or self.why_not_fused(op) is not None:
            return False
        return len(self._readers[part.storage]) == 1


def _order(seen: TensorType, whole: TensorType) -> tuple[int, ...] | None:
    """Which dimension of a tensor each dimension of a view of it is; None if the view is anything but a permutation."""
    dims = list(zip(whole.shape, whole.stride, strict=True))
    order: list[int] = []
    for dim in zip(seen.shape, seen.stride, strict=True):
        found = [d for d, known in enumerate(dims) if known == dim and d not in order]
        if not found:
            return None
        order.append(found[0])
    return tuple(order) if len(order) == len(dims) and not seen.offset else None


class _Joining(Rewriting):
    """The graph on its way."""

    def __init__(self, graph: Graph, joins: list[Join]) -> None:
        super().__init__(graph)
        self._joins = {id(join.op): join for join in joins}
        self._copies = {id(join.copy) for join in joins if join.copy is not None}

    def rewritten(self) -> Graph:
        """Raises Stuck."""
        for op in self.graph.ops:
            if id(op) in self._joins:
                self._fill(self._joins[id(op)])
            elif id(op) in self._copies:
                self.name(aten.alias.default, self.stands(op.inputs[0]), op.results[0])
            else:
                self.follow(op)
        return self.graph_now()

    def _fill(self, join: Join) -> None:
        (whole,) = join.op.results
        shape = torch.Size([whole.type.shape[d] for d in join.order])
        memory = self.memory(with_shape(whole.type, shape))
        back = tuple(join.order.index(d) for d in range(len(shape)))
        start = 0
        for part in join.op.args[0]:
            there = self.view(aten.permute.default, memory, back)
            if join.op.target is aten.stack.default:
                there = self.view(aten.select.int, there, join.dim, start)
                start += 1
            else:
                end = start + part.type.shape[join.dim]
                there, start = self.view(aten.slice.Tensor, there, join.dim, start, end), end
            self.write(aten.copy_.default, there, self.stands(part))
        self.name(aten.permute.default, memory, whole, back)
