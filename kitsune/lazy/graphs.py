"""From a path in the trie to the Graph that the later stages take."""

from typing import Any

from kitsune.ir import Effects, Graph, Kind, Op, Value
from kitsune.ir.graph import PURE
from kitsune.lazy.cell import Ref
from kitsune.lazy.trie import Node


def graph_of(last: Node, live: tuple[int, ...]) -> Graph:
    """The region that ends with `last`, of which the values `live` can still be read."""
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
    return Graph(tuple(inputs), tuple(ops), tuple(values[number] for number in live))


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
