"""Convolutions, and what lies between them, in channels-last: the layout that the library's fast kernels work in.

From contiguous operands the library makes copies in channels-last, and from its results copies back. Here the values between
convolutions stay as the library has them. What is made by a kernel is written so by that kernel: the batch and the weights where
they are cast, gradients where they are summed. Results that somebody can see are as they were recorded.
"""

from collections import Counter
from dataclasses import replace

import torch

from kitsune.ir import Graph, Kind, Op, TensorType, Value
from kitsune.scheduler.cost import Costs
from kitsune.scheduler.formats import (
    CONVOLUTIONS,
    ROWS,
    channels_last,
    elementwise,
    in_vectors,
    is_channels_last,
    is_dense,
    results_at,
    why_not_channels_last,
    with_strides,
)
from kitsune.scheduler.passes import dead_code
from kitsune.scheduler.rewriting import FOLLOWING, Rewriting, Stuck, reading

# New results of these have their operand's strides, if it has no gaps.
PRESERVING = {"clone", "_to_copy", "ones_like", "zeros_like", "full_like"}
# Pointwise, but not by torch's iterator over elements, which gives results their strides.
OTHERWISE = {"tril", "triu", "copy", "native_dropout_backward"}
SUMS = {"sum", "mean", "amax", "amin"}


def in_channels_last(graph: Graph, costs: Costs) -> Graph:
    """The graph with those convolutions in channels-last for which it pays, by connected parts of the graph."""
    able = {n for n, op in enumerate(graph.ops) if op.target._opname in ROWS and why_not_channels_last(op) is None}
    if not any(graph.ops[n].target._opname in CONVOLUTIONS for n in able):
        return graph
    parts = _Parts(graph, able)
    gains: Counter[int] = Counter()
    for op in (graph.ops[n] for n in able):
        if op.target._opname in CONVOLUTIONS and in_vectors(op):
            gains[parts.of_op(op)] += sum(v.type.nbytes for v in _images(op))
    chosen = {n for n in able if costs.channels_last(gains[parts.of_op(graph.ops[n])], 0)}
    while chosen:
        try:
            rewriting = _ChannelsLast(graph, chosen)
            found = dead_code(rewriting.rewritten())
        except Stuck:
            return graph
        copied = rewriting.copied_bytes(found, parts)
        part_of = {n: parts.of_op(graph.ops[n]) for n in chosen}
        paying = {n for n, part in part_of.items() if costs.channels_last(gains[part], copied[part])}
        if paying == chosen:
            return found
        chosen = paying
    return graph


def _images(op: Op) -> list[Value]:
    row = ROWS[op.target._opname]
    return [op.args[k] for k in row.operands] + [op.results[k] for k in results_at(op, row.results)]


class _Parts:
    """The connected parts of a graph: ops that hand images to each other, also through pointwise ops."""

    def __init__(self, graph: Graph, able: set[int]) -> None:
        self._above: dict[int, int] = {}
        for n, op in enumerate(graph.ops):
            if n in able:
                touched = _images(op)
            else:
                touched = [v for v in (*op.inputs, *op.outputs) if op.kind is Kind.POINTWISE and len(v.type.shape) == 4]
            for value in touched[1:]:
                self._above[self.of(value.storage)] = self.of(touched[0].storage)

    def of(self, storage: int) -> int:
        """The part that a storage is in, as one of its storages."""
        while (above := self._above.get(storage, storage)) != storage:
            storage = above
        return storage

    def of_op(self, op: Op) -> int:
        """The part of an op that can be in channels-last."""
        return self.of(op.args[ROWS[op.target._opname].operands[0]].storage)


class _ChannelsLast(Rewriting):
    """The graph on its way. `last` has copies in channels-last of values that lie otherwise."""

    def __init__(self, graph: Graph, chosen: set[int]) -> None:
        super().__init__(graph)
        self.chosen = chosen
        self.last: dict[int, tuple[Value, int]] = {}

    def rewritten(self) -> Graph:
        """Raises Stuck."""
        for number, op in enumerate(self.graph.ops):
            if number in self.chosen:
                self._in_channels_last(op)
            else:
                self.follow(op)
                # Also where nothing stands for what is written.
                self.out_of_date(set(op.effects.writes))
        return self.graph_now()

    def copied_bytes(self, graph: Graph, parts: _Parts) -> "Counter[int]":
        """By part the bytes that copies between two calls of the library move; all others are part of a kernel."""
        makers = {v.id: op.kind for op in graph.ops for v in op.results}
        by_library = {v.id for op in graph.ops if op.kind is not Kind.POINTWISE for v in op.inputs}
        found: Counter[int] = Counter()
        for op in graph.ops:
            for target in op.results:
                if target.id in self.copied & by_library and makers.get(op.inputs[0].id) is not Kind.POINTWISE:
                    found[parts.of(op.inputs[0].storage)] += 2 * target.type.nbytes
        return found

    def out_of_date(self, storages: set[int]) -> None:
        """Copies of what lies in these storages may not be read any more."""
        super().out_of_date(storages)
        for number in [number for number, (_, storage) in self.last.items() if storage in storages]:
            del self.last[number]

    def operand(self, op: Op, value: Value) -> Value:
        """An image in channels-last, if a pointwise op makes a new one and reads another one in channels-last."""
        if op.kind is Kind.POINTWISE and op.results and value.type.shape == op.results[0].type.shape and self._reads_last(op):
            return self._last(value)
        return self.stands(value)

    def _reads_last(self, op: Op) -> bool:
        return any(v.id in self.now and is_channels_last(self.now[v.id].type) for v in op.inputs)

    def _last(self, value: Value) -> Value:
        """A value in channels-last."""
        stands = self.stands(value)
        wanted = channels_last(stands.type)
        if stands.type.stride == wanted.stride:
            return stands
        if value.id not in self.last:
            self._keep(value, self.copy(stands, self.value(wanted)), stands.storage)
        return self.last[value.id][0]

    def _keep(self, value: Value, copy: Value, storage: int) -> None:
        """A copy in channels-last is there, until what lies in that storage is written."""
        self.last[value.id] = copy, storage

    def _in_channels_last(self, op: Op) -> None:
        """Add an op that is told by its operands to work in channels-last."""
        row = ROWS[op.target._opname]
        results, back = list(op.results), []
        for k in results_at(op, row.results):
            if results[k].storage in self.seen:
                back.append(k)
            else:
                results[k] = replace(results[k], type=channels_last(results[k].type))
        # The gradient of a weight goes to whoever updates the weight, which is as it was.
        for k in back + results_at(op, row.grad_weight):
            results[k] = self.value(channels_last(results[k].type))
            back.append(k)
        wanted = {op.args[k].id for k in (*row.operands, *row.weight)}
        self.add(op, reading(op, lambda v: self._last(v) if v.id in wanted else self.stands(v), tuple(results)))
        for k in set(back):
            recorded = op.results[k]
            del self.now[recorded.id]
            self.copy(results[k], recorded)
            self._keep(recorded, results[k], recorded.storage)

    def types(self, op: Op, now: Op) -> tuple[TensorType, ...] | None:
        """The types of the results of an op, no view, as `now` reads its operands; None if it must have the recorded ones."""
        recorded = tuple(v.type for v in op.results)
        if op.effects.random:
            return None
        if op.kind is Kind.POINTWISE:
            # Only where the rule explains what was recorded may it say what there would be.
            return _pointwise(now) if _pointwise(op) == recorded else None
        pairs = [(before.type, after.type) for before, after in zip(op.inputs, now.inputs, strict=True)]
        if op.kind is Kind.GEMM or all(before is after for before, after in pairs):
            return recorded if op.kind in FOLLOWING else None
        return recorded if op.target._opname in SUMS and _over_images(op) else None


def _pointwise(op: Op) -> tuple[TensorType, ...] | None:
    """The types of the new results of a pointwise op; None where that is not known."""
    format_ = dict(op.kwargs).get("memory_format", torch.preserve_format)
    if op.target._opname in OTHERWISE:
        return None
    if format_ not in (None, torch.preserve_format):
        return tuple(v.type for v in op.results)
    operands = [v.type for v in op.inputs]
    if op.target._opname in PRESERVING:
        del operands[1:]
    kept = operands[0].stride if op.target._opname in PRESERVING and is_dense(operands[0]) else None
    return tuple(with_strides(v.type, kept or elementwise(v.type.shape, operands)) for v in op.results)


def _over_images(op: Op) -> bool:
    """Is a whole image summed up, or all of a channel? The results' strides do not depend on the images' then."""
    if len(op.args) < 2 or not isinstance(op.args[1], tuple):
        return op.target._overloadname == "default"
    dims = {d % 4 for d in op.args[1]}
    keeps = len(op.args) > 2 and op.args[2]
    return len(op.inputs[0].type.shape) == 4 and (dims == {2, 3} or (dims == {0, 2, 3} and not keeps))
