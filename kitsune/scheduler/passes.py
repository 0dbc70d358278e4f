"""Rewrites of a Graph before it is planned. A pass is a function Graph -> Graph; the runner verifies, times and shows it."""

import time
from collections.abc import Callable, Sequence

from kitsune.ir import Graph, Kind, Op, verify

Pass = Callable[[Graph], Graph]


def run_passes(
    graph: Graph, passes: Sequence[Pass], check: bool = False, show: Callable[[str, Graph, float], None] | None = None
) -> Graph:
    """Apply passes in order; `check` verifies after each, `show` hears each one's name, result and seconds."""
    for one in passes:
        start = time.perf_counter()
        graph = one(graph)
        if check:
            verify(graph)
        if show is not None:
            show(one.__name__, graph, time.perf_counter() - start)
    return graph


def dead_code(graph: Graph) -> Graph:
    """Without the ops whose effects nobody can see."""
    kept = needed_ops(graph)
    return graph if len(kept) == len(graph.ops) else Graph(graph.inputs, tuple(kept), graph.outputs, graph.awaited)


def needed_ops(graph: Graph) -> list[Op]:
    """The ops whose effects somebody can see. Judged by storage: a dead base may have a living view."""
    needed = {v.storage for v in graph.inputs} | {v.storage for v in graph.outputs}
    read = {v.id for v in graph.outputs}
    kept = []
    # In one piece, for each first run of a region waits for it: 2,900 operators take 4 ms.
    for op in reversed(graph.ops):
        effects, results = op.effects, op.results
        if effects.random or (effects.writes and not needed.isdisjoint(effects.writes)):
            pass
        elif op.kind is Kind.VIEW:
            # A view of an input shares its storage but changes nothing: needed only if it is read, which its value says.
            if read.isdisjoint([v.id for v in results]):
                continue
        elif needed.isdisjoint([v.storage for v in results]):
            continue
        kept.append(op)
        for value in op.inputs:
            needed.add(value.storage)
            read.add(value.id)
    return kept[::-1]
