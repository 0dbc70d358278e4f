"""What every Plan must satisfy: each op once, nothing unordered that touches the same bytes, no byte for two living storages.

Everything is worked out again, from streams, waits and what the kernels really load and store; nothing is believed of what the
planner has worked out on its way.
"""

from collections import defaultdict
from collections.abc import Iterator

from kitsune.ir.clocks import Clocks, clocks_of
from kitsune.ir.edges import bits, predecessors, roots
from kitsune.ir.graph import Kind, Value
from kitsune.ir.plan import Access, Kernel, Launch, Plan

# A storage that a launch touches: by which of its kernels, and does it write?
Touch = tuple[int, int, bool]


def verify_plan(plan: Plan) -> None:
    """Raise ValueError where a plan is unsound."""
    clocks = clocks_of(plan.launches)
    _check_needs(plan, clocks)
    touches = touches_of(plan)
    for storage, found in touches.items():
        _check_conflicts(plan, clocks, storage, found)
    _check_kernels(plan)
    _check_arena(plan, clocks, touches)
    _check_drops(plan, touches)


def _check_needs(plan: Plan, clocks: Clocks) -> None:
    """Every op follows those that it needs: in its kernel, or in a launch that has ended before its own starts."""
    places = _launched_once(plan)
    needs = predecessors(plan.graph)
    for number, (k, kernel) in places.items():
        for other in bits(needs[number]):
            before, its_kernel = places[other]
            if before != k and not clocks.ended(before, k):
                raise ValueError(f"launch {k} ({plan.launches[k].name}) may start before {plan.graph.ops[other].target} has run")
            if before == k and its_kernel != kernel:
                raise ValueError(f"launch {k} ({plan.launches[k].name}) has two kernels of which one needs the other")


def _launched_once(plan: Plan) -> dict[int, tuple[int, int]]:
    """The launch of each op, and the kernel in it, by the op's number in the graph; views are made on the host."""
    numbers = {id(op): number for number, op in enumerate(plan.graph.ops)}
    found: dict[int, tuple[int, int]] = {}
    for k, launch in enumerate(plan.launches):
        groups = [[step.op for step in kernel.steps] for kernel in launch.kernels] or [list(launch.ops)]
        for kernel, ops in enumerate(groups):
            order = [numbers[id(op)] for op in ops]
            if order != sorted(order):
                raise ValueError(f"launch {k} ({launch.name}) computes its operators out of order")
            for number in order:
                if number in found:
                    raise ValueError(f"{plan.graph.ops[number].target} is launched twice")
                found[number] = k, kernel
    for number, op in enumerate(plan.graph.ops):
        if number not in found and op.kind is not Kind.VIEW:
            raise ValueError(f"{op.target} is never launched")
    return {number: place for number, place in found.items() if not plan.graph.ops[number].starts_nothing}


def touches_of(plan: Plan) -> dict[int, list[Touch]]:
    """By storage, which launches touch it on the device, in the plan's order."""
    found: dict[int, list[Touch]] = defaultdict(list)
    for k, launch in enumerate(plan.launches):
        if launch.host_only:
            continue
        for storage, writes in _touched(launch):
            found[storage].append((k, 0, writes))
        for number, kernel in enumerate(launch.kernels):
            for access, writes in _accesses(kernel):
                found[access.value.storage].append((k, number, writes))
    return found


def _touched(launch: Launch) -> Iterator[tuple[int, bool]]:
    """What a call of the library reads and writes."""
    if launch.op is not None:
        yield from ((v.storage, False) for v in launch.op.inputs)
        yield from ((storage, True) for storage in launch.op.effects.writes)
        yield from ((v.storage, True) for v in launch.op.results)


def _accesses(kernel: Kernel) -> Iterator[tuple[Access, bool]]:
    yield from ((access, False) for access in kernel.loads)
    yield from ((store.access, True) for store in kernel.stores)


def _check_conflicts(plan: Plan, clocks: Clocks, storage: int, touches: list[Touch]) -> None:
    """Of two launches that touch one storage, one of them writing, the earlier has ended before the later starts.

    Writes are therefore in a row, so that a read need be compared with the last one alone.
    """
    written: list[int] = []
    reading: list[int] = []
    for k, _, writes in touches:
        for other in (*written, *reading) if writes else written:
            if other != k and not clocks.ended(other, k):
                names = f"{other} ({plan.launches[other].name}) and {k} ({plan.launches[k].name})"
                raise ValueError(f"launches {names} are not ordered, and touch storage {storage}, which one of them writes")
        if writes:
            written, reading = [k], []
        else:
            reading.append(k)


def _check_kernels(plan: Plan) -> None:
    """Kernels that are started together share nothing that one of them writes, and each stays within its tensors."""
    root_of = roots(plan.graph)
    for k, launch in enumerate(plan.launches):
        written: dict[int, int] = {}
        for number, kernel in enumerate(launch.kernels):
            _check_walks(kernel, root_of, f"launch {k} ({launch.name})")
            for store in kernel.stores:
                if written.setdefault(store.access.value.storage, number) != number:
                    raise ValueError(f"launch {k} ({launch.name}) has two kernels that write {store.access.value}")
        for number, kernel in enumerate(launch.kernels):
            for load in kernel.loads:
                if written.get(load.value.storage, number) != number:
                    raise ValueError(
                        f"launch {k} ({launch.name}) has two kernels of which one reads {load.value}, which the other writes"
                    )


def _check_walks(kernel: Kernel, root_of: dict[int, Value], where: str) -> None:
    """A kernel reaches from the first to the last element of each tensor; what it stores it loads at the same element, if at all.

    Its elements are computed in no order, each with all of its loads before its stores.
    """
    for access, _ in _accesses(kernel):
        whole = access.value.type.extent_bytes
        if all(kernel.domain) and _reach(access, kernel) != whole:
            raise ValueError(f"{where} reaches over {_reach(access, kernel)} bytes of {access.value}, which has {whole}")
    for store in kernel.stores:
        mine = store.access
        for other, _ in _accesses(kernel):
            if other.value.storage != mine.value.storage:
                continue
            comparable = root_of.get(other.value.id, other.value) is root_of.get(mine.value.id, mine.value)
            if not comparable or other.strides != mine.strides or other.value.type.offset != mine.value.type.offset:
                raise ValueError(f"{where} stores {mine.value} while other elements of it are in use")


def _reach(access: Access, kernel: Kernel) -> int:
    """Bytes from the first to the last element that an access reaches: of an operand whose neighbours are read, all."""
    if kernel.steps[0].op.kind is Kind.WINDOW:
        return access.value.type.extent_bytes
    reach = sum((n - 1) * s for n, s in zip(kernel.domain, access.strides, strict=True)) + 1
    return reach * access.value.type.dtype.itemsize if all(kernel.domain) else 0


def _check_arena(plan: Plan, clocks: Clocks, touches: dict[int, list[Touch]]) -> None:
    """Storages on the same bytes are one location: whatever touches the one has ended before anything touches the other."""
    sizes = _sizes(plan)
    # The arena is lent again after the run.
    if outside := {v.storage for v in (*plan.graph.inputs, *plan.graph.outputs)} & plan.offsets.keys():
        raise ValueError(f"storage {min(outside)} lies in the arena, and others hold it")
    here = [storage for storage in plan.offsets if storage in touches]
    n_streams = 1 + max(clocks.stream, default=0)
    # By storage: the last of its launches on each stream, and how far every stream has come before any of its launches.
    last = {storage: [0] * n_streams for storage in here}
    seen = {storage: clocks.seen[touches[storage][0][0]] for storage in here}
    for storage in here:
        for k, _, _ in touches[storage]:
            last[storage][clocks.stream[k]] = max(last[storage][clocks.stream[k]], clocks.turn[k])
            seen[storage] = tuple(map(min, seen[storage], clocks.seen[k]))
    placed = sorted((plan.offsets[s], plan.offsets[s] + sizes[s], s) for s in here)
    for i, (start, end, a) in enumerate(placed):
        if start < 0 or end > plan.arena:
            raise ValueError(f"storage {a} lies outside of the arena")
        for low, _, b in placed[i + 1 :]:
            if low >= end:
                break
            if not _over(last[a], seen[b]) and not _over(last[b], seen[a]):
                raise ValueError(f"storages {a} and {b} share bytes while both are in use")


def _over(last: list[int], seen: tuple[int, ...]) -> bool:
    return all(turn <= ended for turn, ended in zip(last, seen, strict=True))


def _sizes(plan: Plan) -> dict[int, int]:
    """Bytes from the start of what is made to the end of everything that lies in the same memory."""
    values: dict[int, list[Value]] = defaultdict(list)
    for op in plan.graph.ops:
        for value in op.outputs:
            values[value.storage].append(value)
    return {storage: max(map(_end, found)) - _end(found[0]) + found[0].type.extent_bytes for storage, found in values.items()}


def _end(value: Value) -> int:
    return value.type.offset * value.type.dtype.itemsize + value.type.extent_bytes


def _check_drops(plan: Plan, touches: dict[int, list[Touch]]) -> None:
    """What is let go of is not touched again, not let go of again, and nobody's outside."""
    alive = {v.storage for v in (*plan.graph.inputs, *plan.graph.outputs)}
    dropped: set[int] = set()
    for k, storages in enumerate(plan.drops):
        for storage in storages:
            if storage in alive or storage in dropped or storage in plan.offsets:
                raise ValueError(f"storage {storage} is let go of by launch {k}, and not its to let go of")
            dropped.add(storage)
            if storage in touches and touches[storage][-1][0] > k:
                raise ValueError(f"storage {storage} is let go of by launch {k} and used after it")


def storages_of(launch: Launch) -> set[int]:
    """The storages that a launch reads or writes."""
    if launch.op is not None:
        return {v.storage for v in (*launch.op.inputs, *launch.op.outputs)}
    return {access.value.storage for kernel in launch.kernels for access, _ in _accesses(kernel)}
