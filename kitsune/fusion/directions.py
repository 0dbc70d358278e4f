"""Which way a reduction goes, along neighbours in memory or across them, and which ops are there for one alone.

An op that is read by reductions of one direction only belongs into a kernel with them: together with one of the other direction
its result would be written to memory and read again. A matter of speed; what may be together is the group's to say.
"""

from collections.abc import Callable, Mapping

from kitsune.ir import Graph, Kind, Op, reduction_of

ALONG, ACROSS, BOTH = "along", "across", "both"


def direction_of(op: Op) -> str | None:
    """Of a reduction; None of any other op."""
    reduction = reduction_of(op)
    if reduction is None:
        return None
    main = next((v for v in op.inputs if v.type.shape == reduction.shape), None)
    if main is None:
        return ALONG
    moving = [d for d, n in enumerate(reduction.shape) if n > 1 and main.type.stride[d]]
    return ALONG if not moving or min(moving, key=lambda d: main.type.stride[d]) in reduction.dims else ACROSS


def directions(graph: Graph, why_not_lowered: Callable[[Op], str | None]) -> Mapping[int, str]:
    """Of each op that is or feeds reductions of one direction, such as may be in kernels, and nothing else; by number."""
    feeds: dict[int, str] = {}
    found: dict[int, str] = {}
    for value in graph.outputs:
        feeds[value.storage] = BOTH
    for number in range(len(graph.ops) - 1, -1, -1):
        op = graph.ops[number]
        if op.kind is Kind.VIEW:
            continue
        way = direction_of(op) if op.kind is Kind.REDUCTION and why_not_lowered(op) is None else None
        passed = way
        if way is None:
            fed = {feeds[v.storage] for v in op.results if v.storage in feeds}
            passed = fed.pop() if len(fed) == 1 and op.kind is Kind.POINTWISE and not op.rewritten else BOTH
            way = passed if passed != BOTH else None
        if way is not None:
            found[number] = way
        for value in op.inputs:
            feeds[value.storage] = passed if feeds.get(value.storage, passed) == passed and passed is not None else BOTH
    return found
