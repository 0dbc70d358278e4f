"""What one call of a static function did, in terms that hold for the next call: regions, where their inputs came from, what
became of their results. Two calls that did the same have equal records, and the second could have done without Python."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch

from kitsune.ir import Graph, Op
from kitsune.static.places import Path
from kitsune.static.surroundings import Surroundings, alike


@dataclass(frozen=True, slots=True)
class Argument:
    """Tensor number `index` among the arguments."""

    index: int


@dataclass(frozen=True, slots=True)
class Made:
    """Value `number` of region `run` of the same call."""

    run: int
    number: int


@dataclass(frozen=True, slots=True, eq=False)
class Outside:
    """A tensor that the function finds by itself: a parameter, a buffer, optimizer state, a variable."""

    tensor: torch.Tensor

    def __eq__(self, other: object) -> bool:
        return type(other) is Outside and other.tensor is self.tensor

    def __hash__(self) -> int:
        return id(self.tensor)


@dataclass(frozen=True, slots=True)
class Gradient:
    """What a leaf has as `.grad` when the function is called."""

    leaf: "Argument | Outside"


@dataclass(frozen=True, slots=True)
class Part:
    """A view of another tensor; `offset` counts elements from that tensor's first."""

    whole: "Argument | Made | Outside"
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


Origin = Argument | Made | Outside | Gradient | Part


@dataclass(frozen=True, slots=True)
class Wrapped:
    """A tensor that is returned as a wrapper: its count of writes, and the name of its used-up history, if it has one."""

    origin: Origin
    version: int
    graded: str | None


@dataclass(frozen=True, slots=True)
class Leaf:
    """What becomes of a leaf's gradient: had it one before, and what it has afterwards: the same, another one, or none."""

    leaf: Argument | Outside
    had: bool
    now: Origin | str | None
    version: int


KEPT = "kept"


@dataclass(frozen=True, slots=True)
class Counter:
    """A counter on the CPU that is updated beside the regions."""

    target: Any
    tensor: Outside
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Counted:
    """Steps that an optimizer's update counts on the host. `steps` are those before it, each number once, and `pattern` which of
    them is that of each count; `earlier` is how often the same call has counted before. The numbers that the update is given:
    floats, which may move with the hyperparameters, and others, in their order."""

    name: str
    counts: tuple[Outside, ...]
    pattern: tuple[int, ...]
    earlier: int
    others: tuple[tuple[str, Any], ...]
    floats: dict[str, float] = field(compare=False)
    steps: list[float] = field(compare=False)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The counts."""
        return [origin.tensor for origin in self.counts]


@dataclass(slots=True)
class Run:
    """A region that ended. `wiring` says where each input came from, None if its ops were not run as one."""

    graph: Graph
    wiring: tuple[tuple[int, Origin], ...] | None = None
    n_values: int = 0
    scalars: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Record:
    """One call. `reason` says why it could not have done without Python; `complete` is False where not all of it was seen."""

    runs: list[Run]
    surroundings: Surroundings
    # Hyperparameters at the beginning of the call.
    numbers: list[float]
    returned: Any = None
    leaves: list[Leaf] = field(default_factory=list)
    # Writes to the tensors that came in, as autograd counts them.
    bumps: list[tuple[Argument | Outside, int]] = field(default_factory=list)
    counters: list[Counter] = field(default_factory=list)
    counted: list[Counted] = field(default_factory=list)
    # Where tensors were found that no module and no optimizer holds: the number of the root, the path, the tensor.
    paths: list[tuple[int, Path, Any]] = field(default_factory=list)
    reason: str | None = None
    complete: bool = False

    @property
    def scalars(self) -> list[float]:
        """The moving numbers of all regions."""
        return [number for run in self.runs for number in run.scalars]

    def outside(self) -> list[torch.Tensor]:
        """Every tensor that is not an argument and not made by the call."""
        return [*self.surroundings.tensors(), *(tensor for _, _, tensor in self.paths)]


def mapped(tree: Any, kinds: Any, change: Callable[[Any], Any], other: Callable[[Any], Any] = lambda leaf: leaf) -> Any:
    """A return value with `change(leaf)` for each leaf of some kinds, and `other(leaf)` for the others."""
    if isinstance(tree, kinds):
        return change(tree)
    if type(tree) is dict:
        return {key: mapped(x, kinds, change, other) for key, x in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)([mapped(x, kinds, change, other) for x in tree])
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*[mapped(x, kinds, change, other) for x in tree])
    return other(tree)


def difference(known: Record, now: Record) -> str | None:
    """The first thing that a call did otherwise than one before it, in words; None if there is none."""
    for before, after in zip_longest(known.runs, now.runs):
        found = _difference_of_runs(before, after)
        if found is not None:
            return found
    if any(run.wiring is None for run in now.runs):
        # Its ops are the same, and what else it did was not seen.
        return None
    if now.reason is not None:
        return now.reason
    if not alike(known.returned, now.returned):
        return "it returned something else"
    for was, leaf in zip_longest(known.leaves, now.leaves):
        if was != leaf:
            return "it left gradients in another state"
    if known.counters != now.counters or known.bumps != now.bumps:
        return "it wrote other tensors, or another number of times"
    if known.counted != now.counted:
        return "an optimizer counted the steps of other parameters"
    return known.surroundings.difference(now.surroundings)


def _difference_of_runs(before: Run | None, after: Run | None) -> str | None:
    known, now = (() if run is None else run.graph.ops for run in (before, after))
    if before is None or after is None or before.graph is not after.graph:
        for k, (a, b) in enumerate(zip_longest(known, now)):
            if a is None or b is None or not _same(a, b):
                return f"operator {k} of a region was {_told(a)} and is now {_told(b)}"
    if before is None or after is None:
        return None
    if before.wiring != after.wiring and after.wiring is not None:
        pairs = zip(before.wiring or (), after.wiring, strict=False)
        number = next((n for (n, a), (_, b) in pairs if a != b), None)
        reader = next((op for op in now if any(v.id == number for v in op.inputs)), None)
        return f"{_told(reader)} read another tensor than before"
    return None


def _same(a: Op, b: Op) -> bool:
    return (
        a.target is b.target
        and a.inputs == b.inputs
        and a.results == b.results
        and a.rewritten == b.rewritten
        and a.grad_enabled == b.grad_enabled
        and alike(a.args, b.args)
        and alike(a.kwargs, b.kwargs)
    )


def _told(op: Op | None) -> str:
    return "nothing" if op is None else f"{op.target} at {op.site or 'no line of Python'}"
