"""What the part of a region before a cut hands over to the part behind it."""

from dataclasses import dataclass
from typing import Any, Protocol

from kitsune.ir.graph import Graph


class Carried(Protocol):
    """What a first part has left for one second part, in the form in which that one reads it."""

    def goes_to(self, graph: Graph) -> bool:
        """Is this the graph that it was left for?"""
        ...

    def restored(self) -> dict[int, Any]:
        """What was kept, by number, as it was recorded."""
        ...


@dataclass(slots=True, eq=False)
class Handover:
    """Between two parts. `kept` are the numbers of results of the first that nobody but the second sees; `first` is the graph as
    which that part was run. With `carried`, those results themselves are not there."""

    kept: frozenset[int]
    first: Graph | None = None
    carried: Carried | None = None

    def goes_to(self, graph: Graph) -> bool:
        """Can this graph be run with what is there?"""
        return self.carried is None or self.carried.goes_to(graph)

    def concerns(self, graph: Graph) -> bool:
        """Does a graph read what is kept, or write what it may have to be made from again?"""
        return any(v.id in self.kept for v in graph.inputs) or any(op.effects.writes for op in graph.ops)
