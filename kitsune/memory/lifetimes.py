"""Which launches use a storage, and which storages are the plan's own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kitsune.ir import Graph, Launch, Op, TensorType, storages_of


@dataclass(frozen=True, slots=True)
class Lifetime:
    """A storage that is made by launch `first` and used by the launches `uses` (bits, `first` among them)."""

    storage: int
    nbytes: int
    first: int
    uses: int
    # Lives and dies in memory that the plan gives it.
    in_arena: bool


def lifetimes(graph: Graph, launches: Sequence[Launch], writes_into: Callable[[Op], bool]) -> list[Lifetime]:
    """The lifetime of each storage made in the plan. `writes_into(op)`: can this library call be given its results' memory?"""
    alive = {v.storage for v in graph.outputs} | {v.storage for v in graph.inputs}
    made: dict[int, tuple[int, int, bool]] = {}
    uses: dict[int, int] = {}
    # Memory for others is in use from the first of them on: what asks for it starts nothing, and is on no stream.
    empty = {v.storage: v.type for op in graph.ops if op.allocates for v in op.results}
    for k, launch in enumerate(launches):
        for storage in () if launch.host_only else storages_of(launch) & empty.keys():
            made.setdefault(storage, (k, empty[storage].extent_bytes, storage not in alive))
        for storage, type_ in _made_by(launch):
            ours = bool(launch.kernels) or (launch.op is not None and writes_into(launch.op))
            made.setdefault(storage, (k, type_.extent_bytes, ours and storage not in alive))
        for storage in storages_of(launch):
            uses[storage] = uses.get(storage, 0) | 1 << k
    # What is returned is held until the end.
    end = 1 << len(launches) - 1 if launches else 0
    held = {s: uses.get(s, 0) | 1 << first | (end if s in alive else 0) for s, (first, _, _) in made.items()}
    return [Lifetime(s, nbytes, first, held[s], ours) for s, (first, nbytes, ours) in made.items()]


def _made_by(launch: Launch) -> list[tuple[int, TensorType]]:
    if launch.op is not None:
        return [] if launch.op.starts_nothing else [(v.storage, v.type) for v in launch.op.results]
    fresh = {v.storage: v.type for kernel in launch.kernels for step in kernel.steps for v in step.op.results}
    stored = {store.access.value.storage for kernel in launch.kernels for store in kernel.stores}
    return [(storage, type_) for storage, type_ in fresh.items() if storage in stored]
