"""What a Graph implies without saying it: which op must follow which, and which tensor a view is a view of."""

from collections.abc import Iterator, Sequence

from kitsune.ir.graph import Graph, Kind, Op, Value
from kitsune.ir.plan import Launch


def predecessors(graph: Graph) -> list[int]:
    """For each op the ops that must run before it, as the bits of an integer; what starts nothing has none.

    An op follows the last write of each storage that it touches, a write follows every read since, and random ops keep
    their order.
    """
    writers: dict[int, int] = {}
    readers: dict[int, int] = {}
    random = 0
    found = []
    for i, op in enumerate(graph.ops):
        before, bit = 0, 1 << i
        if not op.starts_nothing:
            for value in op.inputs:
                before |= writers.get(value.storage, 0)
                readers[value.storage] = readers.get(value.storage, 0) | bit
            for storage in op.effects.writes:
                before |= readers.get(storage, 0)
                writers[storage], readers[storage] = bit, 0
            for value in op.results:
                writers.setdefault(value.storage, bit)
            if op.effects.random:
                before |= random
                random = bit
        found.append(before & ~bit)
    return found


def bits(mask: int) -> Iterator[int]:
    """The numbers of the bits that are set, lowest first."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def roots(graph: Graph) -> dict[int, Value]:
    """For each value, by number, a stand-in for the memory that its offset counts in: two values with one root are comparable.

    The root is an input, or what an op made that is no view. All views of an input share one root apart from the input's own,
    since a region is known without the offset at which an input begins, and theirs are counted from the start of its memory;
    but a view that a planner has derived has the root of its operand.
    A view that changes the dtype counts its elements in another unit and is a root of its own.
    """
    found = {value.id: value for value in graph.inputs}
    behind = {v.id: Value(v.id, v.type, v.storage, v.version) for v in graph.inputs}
    for op in graph.ops:
        for before, after in op.rewritten:
            found[after.id] = found[before.id]
        for value in op.results:
            found[value.id] = _root(op, value, found, behind)
    return found


def _root(op: Op, value: Value, found: dict[int, Value], behind: dict[int, Value]) -> Value:
    if op.kind is not Kind.VIEW or not op.inputs:
        return value
    base = op.inputs[0]
    if base.storage != value.storage or base.type.dtype is not value.type.dtype or value.type.conj or value.type.neg:
        return value
    root = found[base.id]
    return root if op.derived else behind.get(root.id, root)


def happens_before(launches: Sequence[Launch]) -> list[int]:
    """For each launch the launches that have ended before it starts, as bits: those earlier on its stream and those that it
    waits for, with all that came before them."""
    last: dict[int, int] = {}
    found: list[int] = []
    for k, launch in enumerate(launches):
        mask = 0
        for n in (*launch.waits, *([last[launch.stream]] if launch.stream in last else ())):
            mask |= found[n] | 1 << n
        found.append(mask)
        last[launch.stream] = k
    return found


def meetings(launches: Sequence[Launch]) -> set[int]:
    """The launches from which on every launch starts after all those before it, whatever their streams."""
    found: set[int] = set()
    on_device = [k for k, launch in enumerate(launches) if not launch.host_only]
    before = happens_before(launches)
    common = -1
    earlier = sum(1 << k for k in on_device)
    for k in reversed(on_device):
        earlier ^= 1 << k
        common &= before[k]
        if not earlier & ~common:
            found.add(k)
    return found


def awaited(launches: Sequence[Launch]) -> list[tuple[int, ...]]:
    """For each launch those whose events it waits for. A launch over no elements is not made: who comes after it on its stream,
    or waits for it, waits for what it would have waited for, and for what it would have followed."""
    found: list[tuple[int, ...]] = []
    # What a stream has come to: its last launch that is made and, of those after it, what they would have waited for.
    behind: dict[int, set[int]] = {}
    for launch in launches:
        waits = {n for m in launch.waits for n in (found[m] if launches[m].is_empty else (m,))}
        here = behind.setdefault(launch.stream, set())
        if launch.is_empty:
            here |= waits
            found.append(tuple(sorted(here)))
        else:
            found.append(tuple(sorted(waits | {n for n in here if launches[n].stream != launch.stream})))
            if not launch.host_only:
                behind[launch.stream] = {len(found) - 1}
    return found
