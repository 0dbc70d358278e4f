"""A region with the one that is expected to follow it, as one graph."""

from dataclasses import dataclass, replace
from typing import Any

from kitsune.ir import Graph, Op, Value, n_values
from kitsune.lazy.graphs import graph_of
from kitsune.lazy.trie import Node

# A question that is asked of a result, and not the rest of a step.
MAX_OPS = 16


@dataclass(frozen=True, slots=True, eq=False)
class Foresight:
    """A region that has followed another one: where it ends and what was alive then, its graph, the values of the one before that
    its inputs are, by number, and those of its own that are read."""

    node: Node
    live: tuple[int, ...]
    graph: Graph
    sources: dict[int, int]
    read: tuple[int, ...]

    def is_of(self, region: Any, live: tuple[int, ...]) -> bool:
        """Is this the region that was foreseen?"""
        return region.node is self.node and live == self.live


def foresight(region: Any, live: tuple[int, ...], sources: dict[int, int]) -> Foresight | None:
    """What is to be remembered of a region whose inputs are `sources` of the one before; None if it may not run with that one."""
    node = region.node
    writes = region.dirty or region.deferred is not None
    if node.depth > MAX_OPS or node.random or writes or region.scalars or node.reads is None:
        return None
    return Foresight(node, live, graph_of(node, live), sources, node.reads.numbers)


def with_foresight(graph: Graph, awaited: tuple[int, ...], foresight: Foresight | None) -> Graph:
    """A graph whose `awaited` values come early, with those of the region that is expected to follow."""
    written = {storage for op in graph.ops for storage in op.effects.writes}
    # Of one that is written later in the region, the number that is read is not the first that is there.
    outputs = {v.id: v for v in graph.outputs if v.storage not in written}
    awaited = tuple(number for number in awaited if number in outputs)
    sources = {} if foresight is None else {n: outputs.get(source) for n, source in foresight.sources.items()}
    if foresight is None or not awaited or any(v is None or v.type.offset for v in sources.values()):
        return Graph(graph.inputs, graph.ops, graph.outputs, awaited)
    renumbering = _Renumbering(graph, [(v, sources[v.id]) for v in foresight.graph.inputs])
    ops = tuple(renumbering.op(op) for op in foresight.graph.ops)
    further = tuple(renumbering.value(v) for v in foresight.graph.outputs)
    read = {renumbering.base + number for number in foresight.read}
    awaited += tuple(v.id for v in further if v.id in read)
    return Graph(graph.inputs, (*graph.ops, *ops), (*graph.outputs, *further), awaited)


class _Renumbering:
    """The ops of a second region, in the numbers of the first."""

    def __init__(self, graph: Graph, inputs: list[tuple[Value, Any]]) -> None:
        self.base = n_values(graph)
        values = (*graph.inputs, *(v for op in graph.ops for v in op.outputs))
        self._storage = 1 + max((v.storage for v in values), default=-1)
        # By its number there: a value is one object, whoever reads it.
        self._values: dict[int, Value] = {v.id: source for v, source in inputs}
        self._storages = {v.storage: source.storage for v, source in inputs}

    def value(self, value: Value) -> Value:
        known = self._values.get(value.id)
        if known is None:
            storage = self._storages.get(value.storage, self._storage + value.storage)
            known = self._values[value.id] = Value(self.base + value.id, value.type, storage, value.version)
        return known

    def op(self, op: Op) -> Op:
        inputs = tuple(self.value(v) for v in op.inputs)
        args, kwargs = self._argument(op.args), tuple((name, self._argument(a)) for name, a in op.kwargs)
        return replace(op, args=args, kwargs=kwargs, inputs=inputs, results=tuple(self.value(v) for v in op.results))

    def _argument(self, argument: Any) -> Any:
        if isinstance(argument, Value):
            return self.value(argument)
        return tuple(self._argument(a) for a in argument) if isinstance(argument, tuple) else argument
