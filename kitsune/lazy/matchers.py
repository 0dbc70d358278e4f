"""A matcher takes one call that is known at its place: Python made for it alone, which compares what comes with what is expected.

Building a key that fits any call, looking it up and stepping on cost 9 us a call; a matcher does it in 3, of which 1 is the
wrapper. What a matcher does not know it leaves to the way of all calls.
"""

import math
from typing import Any

from kitsune.lazy.call_keys import LONG
from kitsune.lazy.edges import Edge
from kitsune.lazy.hands_off import DETACHES
from kitsune.lazy.input_views import VIEWS
from kitsune.lazy.matcher_steps import MISS, compiled, followed, only_under, under_lock
from kitsune.lazy.matcher_writer import Unsuited, Writer
from kitsune.lazy.scalar_sources import kind_of


def matcher_for(edge: Edge, key: Any, args: Any, kwargs: Any, moves: dict[Any, bool] | None) -> Any:
    """The matcher of an edge, along which a call with this key leads, and arguments like these examples; None where there can be
    none.

    `moves` is given where its floats may be any, as long as it holds True for the function.
    """
    w = Writer()
    try:
        # Calls in C only: one of torch's functions in Python would come here again and again. And a view may yet be recorded.
        made = edge.func in DETACHES or (edge.func in VIEWS and edge.node is not edge.start)
        if edge.node.full or (edge.plain and not made):
            raise Unsuited
        n = len(args)
        w.unless(f"len(args) == {n} and " + (f"kwargs and len(kwargs) == {len(kwargs)}" if kwargs else "not kwargs"))
        for k, (a, part) in enumerate(zip(args, key[2 : 2 + n], strict=True)):
            w.part(w.name(f"args[{k}]"), a, part)
        for (name, a), part in zip(kwargs.items(), key[3 + n :: 2], strict=True):
            w.part(w.name(f"kwargs.get({name!r}, MISS)"), a, part)
        if not (edge.start.depth or edge.dirty) and any(new.number is None for new in w.fresh):
            # It may be the second question about a result: its answer may be there already.
            raise Unsuited
        if len(w.flat) >= LONG:
            # Its text would take 9 ms to compile: 36 tensors of a fused update.
            raise Unsuited
        _same_floats(w, edge, moves, (edge.func, *kwargs))
        only_under(w, edge)
        if edge.plain:
            w.lines.append(f"return lane.made({w.bind(edge.func)}, args, kwargs)")
        else:
            then, returned = followed(w, edge, "args", "kwargs")
            under_lock(w, then, returned)
    except Unsuited:
        return None
    matcher = compiled(w, "lane, region, node, args, kwargs")
    matcher.learned = [(edge, key)]
    return matcher


def either(one: Any, other: Any) -> Any:
    """Two matchers as one. Of more than these two the elder is forgotten."""

    def matcher(lane: Any, region: Any, node: Any, args: Any, kwargs: Any) -> Any:
        result = one(lane, region, node, args, kwargs)
        return other(lane, region, node, args, kwargs) if result is MISS else result

    other = getattr(other, "one", other)
    matcher.one = one  # type: ignore[attr-defined]
    matcher.learned = learned_by(one) + learned_by(other)  # type: ignore[attr-defined]
    return matcher


def learned_by(matcher: Any) -> list[tuple[Edge, Any]]:
    """The edges along which a matcher leads, with the keys of their calls."""
    return getattr(matcher, "learned", [])


def _same_floats(w: Writer, edge: Edge, moves: Any, name: Any) -> None:
    if w.floats and moves is not None:
        w.unless(f"{w.bind(moves)}.get({w.bind(name)})")
        for a, known in zip(w.floats, edge.floats, strict=True):
            w.unless(f"kind_of({a}) == {w.bind(kind_of(known))}")
        return
    for a, known in zip(w.floats, edge.floats, strict=True):
        # 0.0 == -0.0, and not a number equals nothing.
        ordinary = known and math.isfinite(known)
        w.unless(f"{a} == {w.bind(known)}" if ordinary else f"{a}.hex() == {w.bind(known.hex())}")
