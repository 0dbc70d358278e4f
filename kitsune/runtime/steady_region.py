"""What is known of one region's runs, as far as its capture depends on it."""

import enum
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from kitsune.ir import lent_memory, storage_of
from kitsune.ir.page import FEW_BYTES
from kitsune.runtime.capturable import GraphFacts, why_not_moving
from kitsune.runtime.captured import Captured, Work
from kitsune.runtime.slots import SlotTable, host_bits

MakeWork = Callable[[SlotTable, frozenset[int]], Work]


class Told(Protocol):
    """Hears of captures; see `kitsune.profiler.Tally`."""

    def captured(self, n_ops: int, nbytes: int) -> None: ...

    def replayed(self) -> None: ...

    def moved(self, n: int) -> None: ...

    def missed(self, reason: str) -> None: ...

    def refused(self, reason: str) -> None: ...


class Outcome(enum.Enum):
    """What came of a replay, or what is to be done instead."""

    DONE = enum.auto()
    # Run in the ordinary way, this time.
    ORDINARY = enum.auto()
    # The same, unless the inputs are where they were at the run before: then capture anew.
    OBSERVE = enum.auto()
    CAPTURE = enum.auto()


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
    # The bits of numbers on the host at the run before.
    on_host: dict[int, bytes] = field(default_factory=dict)
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

    def moved_on_host(self, values: list[Any]) -> int | None:
        """The first input on the host that has another value than at the run before."""
        before, self.on_host = self.on_host, {n: host_bits(values[n]) for n in self.facts.host_numbers}
        return next((n for n, bits in self.on_host.items() if before.get(n) != bits), None)

    def copies_to_come(self, values: list[Any]) -> list[int]:
        """The inputs that lie where a graph leaves small results. Of one that is held from replay to replay, such as a loss, it
        will hand out copies, each of them elsewhere."""
        few = [n for n in self.inputs if storage_of(values[n]).nbytes() <= FEW_BYTES]
        return [n for n in few if lent_memory(values[n]) is not None and why_not_moving(self.facts, n, values[n]) is None]
