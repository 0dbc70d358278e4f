"""What is known of one region's runs, as far as its capture depends on it."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from kitsune.runtime.capturable import GraphFacts
from kitsune.runtime.captured import Captured, Work
from kitsune.runtime.slots import SlotTable

MakeWork = Callable[[SlotTable, frozenset[int]], Work]


@dataclass(slots=True, eq=False)
class Steady:
    """What is known of the runs of one region. `facts` are of what runs, without dead code; `make_work(table, moved)` makes what
    is captured, given the numbers that have been seen to move."""

    facts: GraphFacts
    make_work: MakeWork
    # Is another way to run the region being prepared? What is found out about this one is then told to nobody.
    provisional: bool = False
    captured: Captured | None = None
    # Why it is not captured any more.
    refusal: str | None = None
    n_runs: int = 0
    n_waits: int = 0
    n_captures: int = 0
    n_elsewhere: int = 0
    n_baked_changes: int = 0
    # Is it to be captured without an ordinary run of its own?
    at_once: bool = False
    # Addresses of the inputs at the ordinary run before, if that was the last run.
    addresses: list[int] | None = None
    # Moving numbers at the run before, if it was an ordinary one, and those that were seen to be others than at a run before.
    numbers: bytes = b""
    moved: set[int] = field(default_factory=set)
    # How often an input was not where it was when the region was captured.
    changes: Counter[int] = field(default_factory=Counter)
    moving: set[int] = field(default_factory=set)

    @property
    def inputs(self) -> tuple[int, ...]:
        """The numbers of the inputs that are used."""
        return self.facts.inputs
