"""From a group to the Kernel that is rendered: its domain, its loads, and the stores that somebody reads."""

from collections.abc import Iterable
from dataclasses import replace

from kitsune.fusion.group import Group
from kitsune.fusion.grouping import Partition
from kitsune.fusion.members import Use, base_name
from kitsune.ir import Access, Kernel, Kind, Load, Local, Step, Store, window_order

MAX_NAME = 48
# Elements of a row over which what is broadcast along it is kept in registers.
ROW = 16
# Neighbours that make a row of their own.
LONG = 256


def as_kernel(group: Group, needed: Iterable[int]) -> Kernel:
    """The kernel of a group that must leave the storages `needed` in memory."""
    keep = set(needed)
    results = [(local, Use(value, layout)) for storage, (local, value, layout) in group.produced.items() if storage in keep]
    loads: list[Use] = []
    steps = [Step(m.op, tuple(_operand(o, loads) for o in m.operands)) for m in group.members]
    uses = loads + [use for _, use in results]
    if group.members[0].op.kind is Kind.WINDOW:
        return _over_windows(group, uses, results, steps)
    strides = [group.strides(use) for use in uses]
    parts = [_coalesced(group, part, strides) for part in _order(group, strides[len(loads) :] + strides[: len(loads)])]
    domain = tuple(n for sizes, _ in parts for n in sizes)
    walks = [tuple(s for walk in of_use for s in walk) for of_use in zip(*(found for _, found in parts), strict=True)]
    accesses = [Access(use.value, walk) for use, walk in zip(uses, walks, strict=True)]
    stores = tuple(Store(local, access) for (local, _), access in zip(results, accesses[len(loads) :], strict=True))
    gathered = tuple(k for k, member in enumerate(group.members) if member.number in group.across)
    return Kernel(_name(group), domain, tuple(accesses[: len(loads)]), tuple(steps), stores, len(parts[-1][0]), gathered)


def is_in_turn(group: Group) -> bool:
    """Do the rows that a group adds up lie evenly in everything that it reads and makes, so that one step leads to the next?"""
    uses = [use for found in group.loaded.values() for use in found]
    uses += [Use(value, layout) for _, value, layout in group.produced.values()]
    strides = [group.strides(use) for use in uses]
    turns, _, columns = _order(group, strides)
    return bool(columns) and len(_coalesced(group, turns, strides)[0]) == 1


def _over_windows(group: Group, uses: list[Use], results: list[tuple[Local, Use]], steps: list[Step]) -> Kernel:
    """All dimensions of the result, since neighbours are looked for along each: operands come with their own strides."""
    type_ = group.members[0].op.outputs[0].type
    order = window_order(type_)
    walks = [Access(use.value, tuple(use.value.type.stride[d] for d in order)) for use in uses]
    n_loads = len(uses) - len(results)
    stores = [Store(local, access) for (local, _), access in zip(results, walks[n_loads:], strict=True)]
    domain = tuple(type_.shape[d] for d in order)
    return Kernel(_name(group), domain, tuple(walks[:n_loads]), tuple(steps), tuple(stores))


def in_rows(kernel: Kernel) -> Kernel | None:
    """The kernel as one over short rows, for each of which what does not move along it is loaded once.

    Such are the numbers of a channel in images in channels-last. None where nothing is broadcast so, or sizes do not fit.
    """
    walks = {access.strides for access in (*kernel.loads, *(store.access for store in kernel.stores))}
    if kernel.reduced or len(kernel.domain) != 2 or kernel.domain[0] % ROW or (0, 1) not in walks:
        return None
    if any(along not in (0, 1) for _, along in walks):
        return None
    n, width = kernel.domain

    def cut(access: Access) -> Access:
        across, along = access.strides
        return Access(access.value, (across * ROW, along, across))

    stores = tuple(Store(store.source, cut(store.access)) for store in kernel.stores)
    return replace(kernel, domain=(n // ROW, width, ROW), loads=tuple(map(cut, kernel.loads)), stores=stores, reduced=1)


def in_long_rows(kernel: Kernel) -> Kernel | None:
    """The kernel as one over rows of neighbours, for each of which what does not move along it is loaded once.

    Such are the numbers of a channel in contiguous images: by elements, each takes two divisions to find its own. None where
    nothing is broadcast so, or rows are short.
    """
    walks = {access.strides for access in (*kernel.loads, *(store.access for store in kernel.stores))}
    if kernel.reduced or len(kernel.domain) < 2 or kernel.domain[-1] < LONG or any(walk[-1] not in (0, 1) for walk in walks):
        return None
    return replace(kernel, reduced=1) if any(walk[-1] == 0 and any(walk) for walk in walks) else None


def kernels_of(p: Partition) -> dict[int, Kernel]:
    """The kernel of each node that is a group, in the order of their last ops."""
    alive = {v.storage for v in (*p.graph.inputs, *p.graph.outputs)}
    readers: dict[int, set[int]] = {}
    for number, op in enumerate(p.graph.ops):
        if number in p.node_of:
            for value in op.inputs:
                readers.setdefault(value.storage, set()).add(p.node_of[number])
    found = {}
    for n in sorted(p.living(), key=lambda n: max(p.nodes[n].numbers)):
        group = p.nodes[n].group
        if group is not None:
            found[n] = as_kernel(group, {s for s in group.produced if s in alive or readers.get(s, set()) - {n}})
    return found


def _operand(operand: Use | Local | None, loads: list[Use]) -> Load | Local | None:
    if not isinstance(operand, Use):
        return operand
    for k, known in enumerate(loads):
        if known is operand:
            return Load(k)
    loads.append(operand)
    return Load(len(loads) - 1)


def _order(group: Group, strides: list[dict[int, int]]) -> tuple[list[int], list[int], list[int]]:
    """The factors, outermost first, as the tensors lie in memory: the first store decides, the next ones break ties.

    Those of rows that are gathered come first, those that are reduced last. Of a group with rows and elements, what is stored for
    each element decides, or else what is loaded.
    """
    gathered, reduced = group.factors.now((group.gathered, group.reduced))
    if reduced:
        strides = sorted(strides, key=lambda s: not any(s.get(f) for f in reduced))

    def key(factor: int) -> tuple[int, ...]:
        return tuple(-s.get(factor, 0) for s in strides)

    columns = list(reduced) if group.positional else sorted(reduced, key=key)
    rows = sorted([f for f in group.factors.sizes if f not in reduced and f not in gathered], key=key)
    return sorted(gathered, key=key), rows, columns


def _coalesced(group: Group, order: list[int], strides: list[dict[int, int]]) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    return _coalesce([group.factors.sizes[f] for f in order], [[s.get(f, 0) for f in order] for s in strides])


def _coalesce(sizes: list[int], walks: list[list[int]]) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Neighbouring dimensions that every tensor walks as if they were one, made one."""
    domain: list[int] = []
    merged: list[list[int]] = [[] for _ in walks]
    for d in range(len(sizes)):
        if domain and all(m[-1] == walk[d] * sizes[d] for m, walk in zip(merged, walks, strict=True)):
            domain[-1] *= sizes[d]
            for m, walk in zip(merged, walks, strict=True):
                m[-1] = walk[d]
        else:
            domain.append(sizes[d])
            for m, walk in zip(merged, walks, strict=True):
                m.append(walk[d])
    return tuple(domain), [tuple(m) for m in merged]


def _name(group: Group) -> str:
    """What the kernel does, in the words of its ops; repeated ones once."""
    words: list[str] = []
    for member in group.members:
        word = base_name(member.op).strip("_").removeprefix("foreach_")
        if word not in words:
            words.append(word)
    name = ""
    for k, word in enumerate(words):
        if len(name) + len(word) > MAX_NAME:
            return f"{name}_and_{len(words) - k}_more"
        name = f"{name}_{word}" if name else word
    return name
