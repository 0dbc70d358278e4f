"""Batch norms behind which a rectifier follows, and through whose gradient nothing else goes.

Which elements the rectifier let pass follows from what the norm read, by the arithmetic of the forward: its backward can do that
again, once for the sums and once for the gradient, instead of reading what came out and writing what is left of the gradient.
"""

from collections import Counter
from dataclasses import dataclass

import torch

from kitsune.ir import Graph, Op, Value, named

aten = torch.ops.aten
FORWARD, BACKWARD = aten.native_batch_norm.default, aten.native_batch_norm_backward.default
NAMES = (aten.detach.default, aten.alias.default)


@dataclass(frozen=True, slots=True)
class Rectifier:
    """The norm's forward, and the backward of the rectifier that follows it."""

    norm: Op
    backward: Op


def rectifiers(graph: Graph) -> dict[int, Rectifier]:
    """By the number of a norm's backward in the graph."""
    if not any(op.target is aten.threshold_backward.default for op in graph.ops):
        return {}
    return _Search(graph).found()


class _Search:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.same: dict[int, Value] = {}
        self.norms: dict[int, int] = {}
        self.thresholds: dict[int, Op] = {}
        self.readers = Counter(v.storage for op in graph.ops for v in op.inputs)
        self.readers.update(v.storage for v in graph.outputs)
        self.writes: dict[int, list[int]] = {}

    def found(self) -> dict[int, Rectifier]:
        """What was looked for."""
        pairs = {}
        for number, op in enumerate(self.graph.ops):
            for storage in op.effects.writes:
                self.writes.setdefault(storage, []).append(number)
            if op.target in NAMES:
                self.same[op.results[0].id] = self._of(op.inputs[0])
            elif op.target is FORWARD:
                self.norms[op.results[0].id] = number
            elif op.target in (aten.relu.default, aten.relu_.default) and op.inputs[0].id in self.norms:
                self.norms[op.outputs[0].id] = self.norms[op.inputs[0].id]
            elif op.target is aten.threshold_backward.default and op.args[2] == 0:
                self.thresholds[op.results[0].id] = op
            elif op.target is BACKWARD and (pair := self._pair(number, op)) is not None:
                pairs[number] = pair
        return pairs

    def _of(self, value: Value) -> Value:
        return self.same.get(value.id, value)

    def _pair(self, number: int, op: Op) -> Rectifier | None:
        arguments = named(op)
        grad = arguments["grad_out"]
        threshold = self.thresholds.get(grad.id)
        first = None if threshold is None else self.norms.get(self._of(threshold.args[1]).id)
        if threshold is None or first is None or self.readers[grad.storage] > 1:
            return None
        norm = self.graph.ops[first]
        given, (out, mean, invstd) = named(norm), norm.results
        pairs = [(arguments["save_mean"], mean), (arguments["save_invstd"], invstd)]
        pairs += [(arguments[name], given[name]) for name in ("input", "weight")]
        if given["weight"] is None or given["bias"] is None or out.type.dtype is not grad.type.dtype:
            return None
        if any(one is None or self._of(one).id != self._of(other).id for one, other in pairs):
            return None
        # What the forward read must still be there.
        kept = {mean.storage, invstd.storage, *(given[name].storage for name in ("input", "weight", "bias"))}
        if any(first < written < number for storage in kept for written in self.writes.get(storage, ())):
            return None
        return Rectifier(norm, threshold)
