"""Sums across rows in the kernel that has the rows in registers.

The backward of a layer norm reduces along rows for the gradient of its input, and across them for those of its parameters and of
the bias before it. In one kernel a block goes through many rows in turn and adds up as they come by; the partial sums of all
blocks are added up by another kernel. Of ViT-B/16 that saves reading 1.9 GB again in a step.
"""

from collections.abc import Callable, Iterable

from kitsune.fusion.directions import ACROSS, ALONG, direction_of
from kitsune.fusion.group import Group
from kitsune.fusion.grouping import Partition, alive, burn, contract, lies_between
from kitsune.fusion.kernels import as_kernel, is_in_turn
from kitsune.fusion.members import base_name
from kitsune.ir import Kernel, Kind

# What a block adds up it holds in registers all the time: a sum takes as many as an operand.
MOST_SUMS = 4


def gather(p: Partition, fits: Callable[[Kernel], bool]) -> None:
    """Let sums across rows join kernels along the same rows, where `fits` says that such a kernel is a good one."""
    makers = {v.storage: number for number, op in enumerate(p.graph.ops) if number in p.node_of for v in op.outputs}
    for n in p.living():
        sums = _sums_across(p, n)
        for home in _homes(p, n, makers) if sums else ():
            if (p.fuel is None or p.fuel > 0) and _join(p, home, n, sums, fits):
                break


def _sums_across(p: Partition, n: int) -> frozenset[int]:
    """The reductions of a node, if all of them are sums across rows."""
    group = p.nodes[n].group
    reductions = [m for m in group.members if m.op.kind is Kind.REDUCTION] if group is not None else []
    across = all(base_name(m.op) == "sum" and direction_of(m.op) == ACROSS for m in reductions)
    return frozenset(m.number for m in reductions) if across else frozenset()


def _homes(p: Partition, n: int, makers: dict[int, int]) -> Iterable[int]:
    """Nodes along rows that make what this one reads or read the same, those first with which it has most bytes in common."""
    shared: dict[int, int] = {}
    for storage, nbytes in _read(p, n).items():
        near = set(p.readers.get(storage, ())) | ({p.node_of[makers[storage]]} if storage in makers else set())
        for home in {alive(p, m) for m in near} - {n}:
            shared[home] = shared.get(home, 0) + nbytes
    return sorted((home for home in shared if _is_along(p, home)), key=lambda home: (-shared[home], home))


def _read(p: Partition, n: int) -> dict[int, int]:
    return {v.storage: v.type.nbytes for number in p.nodes[n].numbers for v in p.graph.ops[number].inputs}


def _is_along(p: Partition, n: int) -> bool:
    group = p.nodes[n].group
    return group is not None and any(direction_of(m.op) == ALONG for m in group.members)


def _join(p: Partition, home: int, n: int, sums: frozenset[int], fits: Callable[[Kernel], bool]) -> bool:
    a, b = p.nodes[home].group, p.nodes[n].group
    assert a is not None and b is not None
    if lies_between(p, home, n) or lies_between(p, n, home):
        return False
    trial = Group(a.roots, a.max_ops, a.across | sums)
    for member in sorted(a.members + b.members, key=lambda m: m.number):
        if trial.add(member.number, member.op) is not None:
            return False
    if len(trial.across) > MOST_SUMS or not is_in_turn(trial) or not fits(as_kernel(trial, trial.produced)):
        return False
    p.nodes[home].group = trial
    contract(p, home, [n])
    burn(p)
    return True
