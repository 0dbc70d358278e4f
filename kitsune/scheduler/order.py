"""The order of launches: every node after those it needs, else as in the program; views and memory are made when asked for."""

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from kitsune.ir import Graph, Kernel, Launch, Op, bits, predecessors, roots


@dataclass(frozen=True, slots=True)
class Work:
    """A node to be ordered: kernels or a library call, and the numbers of its ops in the graph."""

    numbers: tuple[int, ...]
    kernels: tuple[Kernel, ...] = ()


def in_order(graph: Graph, works: Iterable[Work], micros: Callable[[Work], float]) -> tuple[Launch, ...]:
    """Launches for `works`, which hold each op of the graph once, views aside.

    A work is ready when all that its ops need has been launched; of the ready ones the one whose last op comes first in the
    program goes next. So a kernel waits for its last op, and nothing is held longer than needed.
    """
    works = list(works)
    owner = {number: k for k, work in enumerate(works) for number in work.numbers}
    before = predecessors(graph)
    waiting: list[set[int]] = []
    followers: list[list[int]] = [[] for _ in works]
    for k, work in enumerate(works):
        needs = {owner[n] for number in work.numbers for n in bits(before[number])} - {k}
        waiting.append(needs)
        for n in needs:
            followers[n].append(k)
    ready = [(max(works[k].numbers), k) for k, needs in enumerate(waiting) if not needs]
    heapq.heapify(ready)
    views = _Views(graph)
    launches: list[Launch] = []
    while ready:
        _, k = heapq.heappop(ready)
        launches += _launches(graph, works[k], views, micros)
        for n in followers[k]:
            waiting[n].discard(k)
            if not waiting[n]:
                heapq.heappush(ready, (max(works[n].numbers), n))
    if any(waiting):
        raise RuntimeError(
            "the kernels of this plan wait for each other in a circle. This is a bug in Kitsune: please report it."
        )
    for value in graph.outputs:
        launches += views.chain(value.id)
    return tuple(launches)


def _launches(graph: Graph, work: Work, views: "_Views", micros: Callable[[Work], float]) -> list[Launch]:
    if not work.kernels:
        op = graph.ops[work.numbers[0]]
        made = [launch for value in op.inputs for launch in views.chain(value.id)]
        return [*made, Launch(op=op, micros=micros(work))]
    # A kernel needs no view, but memory, and the root of a view that changes the dtype is itself a view.
    accesses = [a for kernel in work.kernels for a in (*kernel.loads, *(s.access for s in kernel.stores))]
    made = [launch for access in accesses for launch in views.chain(views.roots[access.value.id].id)]
    return [*made, Launch(kernels=work.kernels, micros=micros(work))]


class _Views:
    """The views and allocations of a graph, each launched once, when its result is first asked for."""

    def __init__(self, graph: Graph) -> None:
        self.makers: dict[int, Op] = {}
        self.roots = roots(graph)
        self.made: set[int] = set()
        self.before: dict[int, int] = {}
        for op in graph.ops:
            for before, after in op.rewritten:
                self.before[after.id] = before.id
            if op.starts_nothing:
                self.makers.update((value.id, op) for value in op.results)

    def chain(self, number: int) -> list[Launch]:
        """The views to be made before value `number` is there as a tensor."""
        while number in self.before:
            number = self.before[number]
        op = self.makers.get(number)
        if op is None or number in self.made:
            return []
        self.made.update(value.id for value in op.results)
        return [launch for value in op.inputs for launch in self.chain(value.id)] + [Launch(op=op)]
