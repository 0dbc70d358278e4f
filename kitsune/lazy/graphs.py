"""From a path in the trie to the Graph that the later stages take."""

from dataclasses import replace
from typing import Any

from kitsune.ir import Effects, Graph, Kind, Op, Value
from kitsune.ir.graph import PURE
from kitsune.lazy.cell import Ref
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
    versions: dict[int, int] = {}
    inputs: list[Value] = []
    ops = []
    for node in last.path():
        if node.op is None:
            node.entered, node.op = _made(node, values, versions)
        else:
            _recall(node, values, versions)
        inputs += node.entered
        ops.append(node.op)
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


def _made(node: Node, values: dict[int, Value], versions: dict[int, int]) -> tuple[tuple[Value, ...], Op]:
    """The values that come in with a node, and its op. They depend on the path alone, so all graphs share them: making the ops
    of 2,900 nodes takes 30 ms, and a region that is new only in what is alive at its end has them already."""
    for number, type_, storage in node.admitted:
        values[number] = Value(number, type_, storage, versions.setdefault(storage, 0))
    return tuple(values[number] for number, *_ in node.admitted), _op(node, values, versions)


def _recall(node: Node, values: dict[int, Value], versions: dict[int, int]) -> None:
    assert node.op is not None
    for value in (*node.entered, *node.op.outputs):
        values[value.id] = value
        versions[value.storage] = value.version


def _op(node: Node, values: dict[int, Value], versions: dict[int, int]) -> Op:
    assert node.row is not None
    inputs: list[Value] = []
    args = tuple([_with_values(a, values, inputs) for a in node.args])
    kwargs = tuple([(name, _with_values(a, values, inputs)) for name, a in node.kwargs])
    rewritten = []
    for _, before, after, storage in node.written:
        versions[storage] += 1
        values[after.id] = Value(after.id, values[before].type, storage, versions[storage])
        rewritten.append((values[before], values[after.id]))
    results = []
    for number, type_, storage in node.results:
        values[number.id] = Value(number.id, type_, storage, versions.setdefault(storage, 0))
        results.append(values[number.id])
    kind = node.row.kind
    if kind is Kind.VIEW and not {v.storage for v in results} <= {v.storage for v in inputs}:
        # In inference mode reshape, contiguous and `to` come by as they are, and this one had to copy.
        kind = Kind.EXTERN
    writes = tuple([after.storage for _, after in rewritten])
    effects = Effects(writes, node.row.random) if writes or node.row.random else PURE
    return Op(
        node.row.target,
        kind,
        args,
        kwargs,
        tuple(inputs),
        node.structure,
        tuple(results),
        tuple(rewritten),
        effects,
        node.grad_enabled,
        node.site,
    )


def _with_values(argument: Any, values: dict[int, Value], inputs: list[Value]) -> Any:
    """An argument with Values, which join `inputs` in their order."""
    cls = type(argument)
    if cls is Ref:
        inputs.append(value := values[argument.id])
        return value
    if cls is tuple:
        return tuple([_with_values(a, values, inputs) for a in argument])
    return argument
