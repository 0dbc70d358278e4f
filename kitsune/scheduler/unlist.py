"""Calls on lists of tensors (`_foreach_*`, the fused optimizers) as one call for each tensor.

So each tensor's part can join the kernels around it (the cast of its gradient, say), and what is left over becomes one launch
again by horizontal fusion.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from kitsune.ir import Effects, Graph, Op, Result, Slot, Value, values_in
from kitsune.ir.graph import PURE

PREFIXES = ("_foreach_", "_fused_adam", "_fused_sgd")


def unlist(graph: Graph, why_not_lowered: Callable[[Op], str | None]) -> Graph:
    """The graph with list calls taken apart where every part can be lowered."""
    ops: list[Op] = []
    for op in graph.ops:
        parts = _parts(op) if op.target._opname.startswith(PREFIXES) else None
        if parts is not None and all(part.outputs and why_not_lowered(part) is None for part in parts):
            ops += parts
        else:
            ops.append(op)
    return graph if len(ops) == len(graph.ops) else Graph(graph.inputs, tuple(ops), graph.outputs)


def _parts(op: Op) -> list[Op] | None:
    """One call for each element of the op's lists; None where its lists are not all of one length."""
    lists = [a for a in (*op.args, *(a for _, a in op.kwargs)) if _is_list(a) and a]
    lengths = {len(a) for a in lists}
    if len(lengths) != 1 or (op.results and len(op.results) != max(lengths)):
        return None
    if len(set(op.effects.writes)) != len(op.effects.writes):
        return None  # two elements in one storage: their order is the lists', not the elements'
    n = lengths.pop()
    return [_part(op, k, n) for k in range(n)]


def _is_list(argument: Any) -> bool:
    # The first element tells: a list of the schema has one type.
    return isinstance(argument, (tuple, list)) and isinstance(next(iter(argument), 0), (Value, Slot, float, int))


def _part(op: Op, k: int, n: int) -> Op:
    def pick(argument: Any) -> Any:
        return (argument[k],) if _is_list(argument) and argument else argument

    args = tuple(pick(a) for a in op.args)
    kwargs = tuple((name, pick(a)) for name, a in op.kwargs)
    inputs = tuple(values_in((args, kwargs)))
    rewritten = op.rewritten[k::n]  # list after list: element k of each
    effects = Effects(tuple(after.storage for _, after in rewritten), op.effects.random) if rewritten else PURE
    results = (op.results[k],) if op.results else ()
    structure = [Result(0)] if results else op.structure
    return replace(
        op, args=args, kwargs=kwargs, inputs=inputs, results=results, structure=structure, rewritten=rewritten, effects=effects
    )
