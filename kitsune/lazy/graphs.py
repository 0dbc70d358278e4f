"""From a path in the trie to the Graph that the later stages take."""

from typing import Any

from kitsune.ir import Effects, Graph, Kind, Op, Value, values_in
from kitsune.ir.graph import PURE
from kitsune.lazy.cell import Ref
from kitsune.lazy.trie import Node


def graph_of(last: Node, live: tuple[int, ...]) -> Graph:
    """The region that ends with `last`, of which the values `live` can still be read."""
    values: dict[int, Value] = {}
    versions: dict[int, int] = {}
    inputs, ops = [], []
    for node in last.path():
        for number, type_, storage in node.admitted:
            values[number] = Value(number, type_, storage, versions.setdefault(storage, 0))
            inputs.append(values[number])
        ops.append(_op(node, values, versions))
    return Graph(tuple(inputs), tuple(ops), tuple(values[number] for number in live))


def _op(node: Node, values: dict[int, Value], versions: dict[int, int]) -> Op:
    assert node.row is not None
    args = tuple(_with_values(a, values) for a in node.args)
    kwargs = tuple((name, _with_values(a, values)) for name, a in node.kwargs)
    inputs = tuple(values_in((args, kwargs)))
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
    writes = tuple(after.storage for _, after in rewritten)
    effects = Effects(writes, node.row.random) if writes or node.row.random else PURE
    return Op(
        node.row.target,
        kind,
        args,
        kwargs,
        inputs,
        node.structure,
        tuple(results),
        tuple(rewritten),
        effects,
        node.grad_enabled,
        node.site,
    )


def _with_values(argument: Any, values: dict[int, Value]) -> Any:
    if isinstance(argument, Ref):
        return values[argument.id]
    if isinstance(argument, tuple):
        return tuple(_with_values(a, values) for a in argument)
    return argument
