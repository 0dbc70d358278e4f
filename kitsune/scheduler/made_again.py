"""Values of the forward that are cheaper made again in the backward than kept: written once, and read again, each.

An activation that a program writes out in ops of its own, such as GPT-2's, has autograd keep four of its steps, 14 bytes for each
element, all of which follow from the 2 bytes that the product before it wrote. The same ops give the same bits the second time.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from kitsune.ir import Graph, Kind, Op, TensorType, Value, n_values
from kitsune.scheduler.cost import Costs

# Ops that are made again for one place, at most, and tensors that they may begin from.
MOST_OPS, MOST_SOURCES = 24, 2


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a value is made of: the storages in memory that it begins from, and the numbers of the ops, in order."""

    sources: frozenset[int]
    ops: tuple[int, ...]


def made_again(graph: Graph, why_not: Callable[[Op], str | None], costs: Costs, fleeting: frozenset[int] = frozenset()) -> Graph:
    """The graph with chains of pointwise ops made again before what reads their results far behind them, where that pays; from
    none of the storages that are `fleeting`."""
    search = _Search(graph, why_not, fleeting)
    places: dict[frozenset[int], dict[int, set[int]]] = {}
    for storage, stages in search.far_readers().items():
        for stage in stages:
            places.setdefault(search.recipes[storage].sources, {}).setdefault(stage, set()).add(storage)
    chosen: dict[int, set[int]] = {}
    for sources, by_stage in places.items():
        if search.pays(sources, by_stage, costs):
            for stage, storages in by_stage.items():
                chosen.setdefault(stage, set()).update(storages)
    return _rewritten(search, chosen) if chosen else graph


class _Search:
    """What is known of a graph's values. A stage counts the library's calls that must have been made before."""

    def __init__(self, graph: Graph, why_not: Callable[[Op], str | None], fleeting: frozenset[int]) -> None:
        self.graph = graph
        self.fusible = [op.kind is Kind.VIEW or (_is_pure(op) and why_not(op) is None) for op in graph.ops]
        self.types: dict[int, TensorType] = {v.storage: v.type for v in graph.inputs}
        # Another one by the time at which it would be read again.
        self.written = {storage for op in graph.ops for storage in op.effects.writes} | fleeting
        self.stages = self._stages()
        self.recipes = self._recipes()

    def _stages(self) -> list[int]:
        of: dict[int, int] = {}
        stages = []
        for op in self.graph.ops:
            stage = max((of.get(v.storage, 0) for v in op.inputs), default=0)
            stages.append(stage)
            after = stage + (op.kind not in (Kind.VIEW, Kind.POINTWISE, Kind.REDUCTION))
            for value in op.outputs:
                of[value.storage] = max(after, of.get(value.storage, 0))
                self.types.setdefault(value.storage, value.type)
        return stages

    def _recipes(self) -> dict[int, Recipe]:
        """Of each storage that pointwise ops make, and that need not be in memory for anybody else."""
        kept = {v.storage for v in (*self.graph.inputs, *self.graph.outputs)} | self.written
        for op, fusible in zip(self.graph.ops, self.fusible, strict=True):
            if not fusible:
                kept |= {v.storage for v in (*op.inputs, *op.outputs)}
        found: dict[int, Recipe] = {}
        for number, op in enumerate(self.graph.ops):
            own = {v.storage for v in op.results}
            if op.kind is Kind.VIEW or not self.fusible[number] or op.late or len(own) != 1 or own & kept:
                continue
            if (recipe := self._recipe(number, op, found, kept - self.written)) is not None:
                found[next(iter(own))] = recipe
        return found

    def _recipe(self, number: int, op: Op, found: dict[int, Recipe], kept: set[int]) -> Recipe | None:
        sources, ops = set[int](), {number}
        for storage in {v.storage for v in op.inputs}:
            if storage in found:
                sources |= found[storage].sources
                ops.update(found[storage].ops)
            elif storage in kept:
                sources.add(storage)
            else:
                return None  # it would have to be kept for this, or be another one by then
        return Recipe(frozenset(sources), tuple(sorted(ops))) if len(sources) <= MOST_SOURCES and len(ops) <= MOST_OPS else None

    def far_readers(self) -> dict[int, set[int]]:
        """Of each such storage the later stages in which it is read, which none but pointwise ops do."""
        made = {v.storage: stage for op, stage in zip(self.graph.ops, self.stages, strict=True) for v in op.results}
        far: dict[int, set[int]] = {}
        for op, stage in zip(self.graph.ops, self.stages, strict=True):
            for storage in {v.storage for v in op.inputs}:
                if op.kind is not Kind.VIEW and storage in self.recipes and stage > made[storage]:
                    far.setdefault(storage, set()).add(stage)
        return far

    def pays(self, sources: frozenset[int], by_stage: dict[int, set[int]], costs: Costs) -> bool:
        """Is what need not be written and read much more than what is read for it, and no less than what is kept for it?"""
        kept = set().union(*by_stage.values())
        again = sum(self.types[storage].nbytes for storage in sources)
        read = sum(self.types[storage].nbytes for storages in by_stage.values() for storage in storages)
        nbytes = sum(self.types[storage].nbytes for storage in kept)
        return nbytes >= again and costs.making_again(nbytes + read, again * len(by_stage))


def _is_pure(op: Op) -> bool:
    return op.kind is Kind.POINTWISE and not op.effects.writes and not op.effects.random


def _rewritten(search: _Search, chosen: dict[int, set[int]]) -> Graph:
    graph = search.graph
    makers: dict[int, list[int]] = {}
    for number, op in enumerate(graph.ops):
        for value in op.results:
            makers.setdefault(value.storage, []).append(number)
    copies = _Copies(graph)
    ops: list[Op] = []
    again: dict[int, dict[int, Value]] = {}
    for number, op in enumerate(graph.ops):
        stage = search.stages[number]
        wanted = {v.storage for v in op.inputs} & chosen.get(stage, set()) if op.kind is not Kind.VIEW else set()
        wanted = {s for s in wanted if search.stages[makers[s][0]] < stage}
        if wanted:
            known = again.setdefault(stage, {})
            needed = {n for s in wanted for n in search.recipes[s].ops}
            # Views of what is made, and of those again, as they were recorded.
            storages = {v.storage for n in needed for v in graph.ops[n].results}
            needed |= {n for s in storages for n in makers[s] if graph.ops[n].kind is Kind.VIEW and n < number}
            for n in sorted(needed):
                if any(v.id not in known for v in graph.ops[n].results):
                    ops.append(copies.of(graph.ops[n], known))
            op = copies.reading(op, {v.id: known[v.id] for v in op.inputs if v.storage in wanted})
        ops.append(op)
    return Graph(graph.inputs, tuple(ops), graph.outputs)


class _Copies:
    """Ops once more, with values of their own."""

    def __init__(self, graph: Graph) -> None:
        self.n_values = n_values(graph)
        self.n_storages = 1 + max((v.storage for op in graph.ops for v in (*op.inputs, *op.outputs)), default=-1)
        self.storages: dict[tuple[int, int], int] = {}

    def of(self, op: Op, known: dict[int, Value]) -> Op:
        """The op, reading what is `known` to have been made again, where its results are known then."""
        results = []
        for value in op.results:
            if op.kind is Kind.VIEW and op.inputs[0].id in known:
                storage = known[op.inputs[0].id].storage
            else:
                storage, self.n_storages = self.n_storages, self.n_storages + 1
            made = replace(value, id=self.n_values, storage=storage)
            self.n_values += 1
            results.append(made)
        copy = replace(self.reading(op, known), results=tuple(results), late=op.kind is not Kind.VIEW)
        known.update((old.id, new) for old, new in zip(op.results, results, strict=True))
        return copy

    def reading(self, op: Op, now: dict[int, Value]) -> Op:
        """The op with other operands."""
        if not any(v.id in now for v in op.inputs):
            return op
        return replace(op, args=_read(op.args, now), kwargs=_read(op.kwargs, now), inputs=_read(op.inputs, now))


def _read(argument: Any, now: dict[int, Value]) -> Any:
    if isinstance(argument, Value):
        return now.get(argument.id, argument)
    return tuple(_read(a, now) for a in argument) if isinstance(argument, tuple) else argument
