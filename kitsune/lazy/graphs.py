"""From a path in the trie to the Graph that the later stages take."""

from kitsune.ir import Graph, Op, Value
from kitsune.lazy.trie import Node


def graph_of(last: Node, live: tuple[int, ...]) -> Graph:
    """The region that ends with `last`, of which the values `live` can still be read."""
    values: dict[int, Value] = {}
    inputs: list[Value] = []
    ops: list[Op] = []
    for node in last.path():
        assert node.op is not None
        inputs += node.entered
        ops.append(node.op)
        for value in (*node.entered, *node.op.outputs):
            values[value.id] = value
    return Graph(tuple(inputs), tuple(ops), tuple([values[number] for number in live]))
