"""What the program waits for is computed first: it goes on while the device does the rest."""

from kitsune.ir import Graph, bits, predecessors


def awaited_first(graph: Graph) -> Graph:
    """The graph with the ops that its awaited values need before all others; both parts in the order that they had."""
    if not graph.awaited:
        return graph
    makers = {value.id: number for number, op in enumerate(graph.ops) for value in op.outputs}
    before = predecessors(graph)
    waiting = [makers[number] for number in graph.awaited if number in makers]
    needed: set[int] = set()
    while waiting:
        number = waiting.pop()
        if number not in needed:
            needed.add(number)
            # Views start nothing, and have no predecessors.
            waiting += [makers[value.id] for value in graph.ops[number].inputs if value.id in makers]
            waiting += bits(before[number])
    if not needed:
        return graph
    order = sorted(range(len(graph.ops)), key=lambda number: number not in needed)
    return Graph(graph.inputs, tuple(graph.ops[number] for number in order), graph.outputs, graph.awaited)
