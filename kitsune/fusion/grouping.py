"""Which ops are put together: in program order each op joins the kernel of an op that it reads, or that reads the same.

Nodes (a kernel to be, or a library call) form a graph of their own; an op may join one only if no path between the two leads
through a third node. `anc` holds, for each node, the nodes before it as bits.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from kitsune.fusion.directions import directions
from kitsune.fusion.eligible import why_not_fusible
from kitsune.fusion.group import MAX_OPS, Group
from kitsune.fusion.members import base_name
from kitsune.ir import Graph, Op, Refusal, bits, predecessors, roots

# An op looks this many nodes back for one that reads the same: further away, results would only be held longer.
NEAR = 32
# Refusals are for reading; a long region repeats itself.
MAX_REFUSALS = 10_000


@dataclass(slots=True)
class Node:
    """A kernel to be (`group`) or a library call; `numbers` are those of its ops in the graph."""

    numbers: list[int]
    group: Group | None = None
    merged: bool = False
    # Why it is a library call.
    reason: str = ""


@dataclass(slots=True)
class Partition:
    """A graph's ops in nodes. `worth(saved_bytes, saved_launches)` says whether joining pays; any answer is correct."""

    graph: Graph
    why_not_lowered: Callable[[Op], str | None]
    worth: Callable[[int, int], bool]
    fuel: int | None = None
    nodes: list[Node] = field(default_factory=list)
    node_of: dict[int, int] = field(default_factory=dict)
    anc: list[int] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    # The nodes that have a node after them, as bits.
    followed: int = 0
    # Of ops that are or feed reductions of one direction only, by number.
    ways: Mapping[int, str] = field(default_factory=dict)
    # Nodes that read a storage, the latest last.
    readers: dict[int, list[int]] = field(default_factory=dict)

    def living(self) -> list[int]:
        """The numbers of the nodes that were not merged into another one."""
        return [k for k, node in enumerate(self.nodes) if not node.merged]


def partition(
    graph: Graph,
    why_not_lowered: Callable[[Op], str | None],
    worth: Callable[[int, int], bool],
    fuel: int | None = None,
    max_ops: int = MAX_OPS,
) -> Partition:
    """Put a graph's ops into nodes, `max_ops` of them at most; `fuel` bounds the number of times that an op joins others."""
    p = Partition(graph, why_not_lowered, worth, fuel, ways=directions(graph, why_not_lowered))
    before, root_of = predecessors(graph), roots(graph)
    for number, op in enumerate(graph.ops):
        if op.starts_nothing:
            continue
        preds = {p.node_of[n] for n in bits(before[number])}
        reason = why_not_fusible(op, why_not_lowered)
        if reason is None:
            _place(p, number, op, preds, Group(root_of, max_ops))
        else:
            _refuse(p, preds, op, reason)
            _new_node(p, number, preds, None)
            p.nodes[-1].reason = reason
        for value in op.inputs:
            nodes = p.readers.setdefault(value.storage, [])
            if not nodes or nodes[-1] != p.node_of[number]:
                nodes.append(p.node_of[number])
    return p


def _place(p: Partition, number: int, op: Op, preds: set[int], fresh: Group) -> None:
    """Let an op join the groups that it reads, or one that reads the same, or open a new one."""
    home: int | None = None
    for candidate in _candidates(p, op, preds):
        if p.fuel is not None and p.fuel <= 0:
            break
        if home is None:
            if _join(p, candidate, number, op, preds):
                home = candidate
        elif candidate in preds:
            _merge(p, home, candidate, op)
    if home is None:
        for n in preds:
            if p.nodes[n].group is None:
                p.refusals.append(Refusal(base_name(p.graph.ops[p.nodes[n].numbers[-1]]), base_name(op), p.nodes[n].reason))
        # An op may be in its own way: one that copies a part of a tensor onto another part.
        reason = fresh.add(number, op)
        _new_node(p, number, preds, fresh if reason is None else None)
        p.nodes[-1].reason = reason or ""


def _candidates(p: Partition, op: Op, preds: set[int]) -> list[int]:
    """The latest producers first, then the latest readers of the same tensors."""
    producers = sorted((n for n in preds if p.nodes[n].group is not None), reverse=True)
    if op.late:
        # Its own kind began a group for it to join, or it begins one.
        return [n for n in producers if p.graph.ops[p.nodes[n].numbers[0]].late]
    siblings: Counter[int] = Counter()
    for value in op.inputs:
        for n in p.readers.get(value.storage, [])[-2:]:
            n = alive(p, n)
            if n not in preds and p.nodes[n].group is not None and len(p.nodes) - n <= NEAR:
                siblings[n] += value.type.nbytes
    return producers + [n for n, _ in siblings.most_common(2)]


def alive(p: Partition, n: int) -> int:
    """The node that a node has become."""
    while p.nodes[n].merged:
        n = p.node_of[p.nodes[n].numbers[0]]
    return n


def _join(p: Partition, n: int, number: int, op: Op, preds: set[int]) -> bool:
    node = p.nodes[n]
    assert node.group is not None
    bit = 1 << n
    between = any(p.anc[m] & bit for m in preds if m != n)
    trial = node.group.copy()
    reason = "another operator lies between them" if between else trial.add(number, op)
    if reason is None and _go_apart(p, node.numbers, [number]):
        reason = "the one feeds a reduction along memory and the other one across it"
    if reason is None and not p.worth(trial.shared_bytes, 1):
        reason = "it would save too little"
    if reason is not None:
        _refuse(p, {n}, op, reason)
        return False
    node.group = trial
    node.numbers.append(number)
    p.node_of[number] = n
    _add_ancestors(p, n, _closure(p, preds) & ~(1 << n))
    burn(p)
    return True


def _merge(p: Partition, home: int, other: int, op: Op) -> None:
    """Take a whole group into the one that an op has joined, since the op reads both."""
    a, b = p.nodes[home], p.nodes[other]
    assert a.group is not None and b.group is not None
    reason: str | None = None
    if lies_between(p, home, other) or lies_between(p, other, home):
        reason = "another operator lies between them"
    trial = Group(a.group.roots, a.group.max_ops)
    saved = 0
    for member in sorted(a.group.members + b.group.members, key=lambda m: m.number):
        reason = reason or trial.add(member.number, member.op)
        if reason is not None:
            break
        saved = trial.shared_bytes
    if reason is None and _go_apart(p, a.numbers, b.numbers):
        reason = "the one feeds a reduction along memory and the other one across it"
    if reason is None and not p.worth(saved, 1):
        reason = "it would save too little"
    if reason is not None:
        _refuse(p, {other}, op, reason)
        return
    a.group = trial
    contract(p, home, [other])
    burn(p)


def _go_apart(p: Partition, some: list[int], others: list[int]) -> bool:
    return len({p.ways[number] for number in (*some, *others) if number in p.ways}) > 1


def contract(p: Partition, home: int, others: Iterable[int]) -> None:
    """Let nodes be one with `home`, and for those who ask what comes before what."""
    mask, before = 1 << home, p.anc[home]
    for other in others:
        node = p.nodes[other]
        node.merged, node.group = True, None
        p.nodes[home].numbers = sorted(p.nodes[home].numbers + node.numbers)
        for number in node.numbers:
            p.node_of[number] = home
        mask |= 1 << other
        before |= p.anc[other]
    before &= ~mask
    p.anc[home] = before
    p.followed |= before
    if p.followed & mask:
        p.followed |= 1 << home
        for n, found in enumerate(p.anc):
            if found & mask:
                p.anc[n] = (found | before | 1 << home) & ~(mask ^ 1 << home)


def lies_between(p: Partition, first: int, last: int) -> bool:
    """Does a node between lie on a path from the one to the other?"""
    anc, bit = p.anc, 1 << first
    between = anc[last] ^ bit if anc[last] & bit else 0
    while between:
        # The latest first: it is the latest that come after what they are asked about.
        n = between.bit_length() - 1
        if anc[n] & bit:
            return True
        between ^= 1 << n
    return False


def _new_node(p: Partition, number: int, preds: set[int], group: Group | None) -> None:
    p.node_of[number] = len(p.nodes)
    p.nodes.append(Node([number], group))
    p.anc.append(_closure(p, preds))


def _closure(p: Partition, preds: set[int]) -> int:
    found = 0
    for n in preds:
        found |= p.anc[n] | 1 << n
    p.followed |= found
    return found


def _add_ancestors(p: Partition, n: int, more: int) -> None:
    if not more & ~p.anc[n]:
        return
    p.anc[n] |= more
    if p.followed >> n & 1:
        bit = 1 << n
        for m, found in enumerate(p.anc):
            if found & bit:
                p.anc[m] = found | more


def burn(p: Partition) -> None:
    """One fusion less is left."""
    if p.fuel is not None:
        p.fuel -= 1


def _refuse(p: Partition, nodes: set[int], op: Op, reason: str) -> None:
    if len(p.refusals) < MAX_REFUSALS:
        for n in nodes:
            if p.nodes[n].group is not None:
                before = base_name(p.graph.ops[p.nodes[n].numbers[-1]])
                p.refusals.append(Refusal(before, base_name(op), reason))
