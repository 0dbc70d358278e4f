"""From a path in the trie to the Graph that the later stages take."""

from dataclasses import replace
from typing import Any

from kitsune.ir import Graph, Op, Value
from kitsune.lazy.trie import Node

# A region has one graph for each set of its values that was alive at its end.
MAX_GRAPHS = 1024


class Graphs:
    """The graphs that were made of paths."""

    def __init__(self) -> None:
        self._made: dict[Any, Graph] = {}

    def get(self, last: Node, live: tuple[int, ...], since: Node | None = None) -> Graph:
        """The graph of a region, as `graph_of` has it."""
        graph = self._made.get((last, live, since))
        if graph is None:
            if len(self._made) > MAX_GRAPHS:
                self._made.clear()
            graph = self._made[(last, live, since)] = graph_of(last, live, since)
        return graph


def graph_of(last: Node, live: tuple[int, ...], since: Node | None = None) -> Graph:
    """The region that ends with `last`, of which the values `live` can still be read; what comes after `since`, if given."""
    values: dict[int, Value] = {}
    inputs: list[Value] = []
    ops: list[Op] = []
    for node in last.path():
        assert node.op is not None
        inputs += node.entered
        ops.append(node.op)
        for value in (*node.entered, *node.op.outputs):
            values[value.id] = value
    outputs = tuple(values[number] for number in live)
    if since is None:
        return Graph(tuple(inputs), tuple(ops), outputs)
    rest = tuple(ops[since.depth :])
    made = {value.id for op in rest for value in op.outputs}
    read = {value.id: value for op in rest for value in op.inputs if value.id not in made}
    graph = Graph(tuple(read.values()), rest, outputs)
    written = {after.storage: after.version for op in ops[: since.depth] for _, after in op.rewritten}
    again = {storage: written[storage] for op in rest for storage in op.effects.writes if storage in written}
    return _counted_anew(graph, again) if again else graph


def _counted_anew(graph: Graph, before: dict[int, int]) -> Graph:
    """The versions of these storages count from the graph's start, `before` which there were so many."""
    new: dict[int, Value] = {}

    def value(v: Value) -> Value:
        if v.storage not in before:
            return v
        if v.id not in new:
            new[v.id] = Value(v.id, v.type, v.storage, max(v.version - before[v.storage], 0))
        return new[v.id]

    def argument(a: Any) -> Any:
        return value(a) if type(a) is Value else tuple(map(argument, a)) if type(a) is tuple else a

    def anew(op: Op) -> Op:
        return replace(
            op,
            args=argument(op.args),
            kwargs=tuple((name, argument(a)) for name, a in op.kwargs),
            inputs=tuple(map(value, op.inputs)),
            results=tuple(map(value, op.results)),
            rewritten=tuple((value(before), value(after)) for before, after in op.rewritten),
        )

    return Graph(tuple(map(value, graph.inputs)), tuple(map(anew, graph.ops)), tuple(map(value, graph.outputs)))
