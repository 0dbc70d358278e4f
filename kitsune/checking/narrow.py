"""The part of a region that shows a difference, as a region of its own; and the first operator that does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from kitsune.checking.compare import same_bits
from kitsune.checking.eager_run import Origin, chain, far_from, leaves
from kitsune.checking.plan_run import executor_of
from kitsune.checking.search import Fault, Ran, Search
from kitsune.ir import Effects, Graph, Kind, Launch, Op, Plan, TensorType, Value, type_of, values_in
from kitsune.runtime.calls import call

MakePlan = Callable[[Graph], Plan]
PrepareLaunch = Callable[[Launch], Any]


@dataclass(frozen=True)
class Part:
    """Ops that lead to a value, as a graph with numbers of its own. `inputs` are its tensors, by number, and
    `eager` has what the ops make of them."""

    graph: Graph
    inputs: dict[int, torch.Tensor]
    eager: list[Any]

    def values(self) -> list[Any]:
        """The inputs in a new list, on memory of their own."""
        found: list[Any] = [None] * len(self.eager)
        for number, tensor in self.inputs.items():
            found[number] = laid_out(tensor, type_of(tensor))
        return found


def laid_out(tensor: torch.Tensor, type_: TensorType) -> torch.Tensor:
    """A copy with the strides of a type."""
    made = torch.empty_strided(type_.shape, type_.stride, dtype=type_.dtype, device=tensor.device)
    # What is expanded has several elements in one place.
    return made.copy_(tensor) if 0 not in type_.stride else tensor.clone()


def part_of(origin: Origin, scalars: list[float]) -> Part | None:
    """The ops that lead to a value from the nearest tensors that the plan has, too; None where those share what is written."""
    found, ops = leaves(origin), chain(origin)
    given = {v.id: v for op in ops for v in op.inputs if v.id in found}
    storages = [v.storage for v in given.values()]
    if any(storages.count(s) > 1 for op in ops for s in op.effects.writes):
        return None
    builder = _Builder(scalars)
    for number, value in given.items():
        builder.enter(value, found[number])
    for op in ops:
        builder.add(op)
    return builder.part(origin.number)


class _Builder:
    def __init__(self, scalars: list[float]) -> None:
        self.scalars = scalars
        self.now: dict[int, Value] = {}
        self.inputs: dict[int, torch.Tensor] = {}
        self.entered: list[Value] = []
        self.ops: list[Op] = []
        self.eager: list[Any] = []
        self._versions: dict[int, int] = {}

    def enter(self, value: Value, tensor: torch.Tensor) -> None:
        copy = laid_out(tensor, value.type)
        self.inputs[len(self.eager)] = laid_out(copy, type_of(copy))
        self.entered.append(self._new(value, type_of(copy), None))
        self.eager[-1] = copy

    def _new(self, value: Value, type_: TensorType, storage: int | None) -> Value:
        number = len(self.eager)
        self.eager.append(None)
        if storage is None:
            storage = len(self._versions)
            self._versions[storage] = 0
        made = self.now[value.id] = Value(number, type_, storage, self._versions[storage])
        return made

    def add(self, op: Op) -> None:
        def bound(a: Any) -> Any:
            if isinstance(a, Value):
                return self.now[a.id]
            return tuple(bound(x) for x in a) if isinstance(a, tuple) else a

        args, kwargs = bound(op.args), tuple((name, bound(a)) for name, a in op.kwargs)
        pairs = []
        for before, after in op.rewritten:
            old = self.now[before.id]
            self._versions[old.storage] += 1
            pairs.append((old, self._new(after, old.type, old.storage)))
        base = self.now[op.inputs[0].id].storage if op.kind is Kind.VIEW else None
        results = tuple(self._new(v, v.type, base) for v in op.results)
        inputs = tuple(values_in((args, tuple(a for _, a in kwargs))))
        effects = Effects(tuple(after.storage for _, after in pairs), op.effects.random)
        made = replace(op, args=args, kwargs=kwargs, inputs=inputs, results=results, rewritten=tuple(pairs), effects=effects)
        call(made, self.eager, self.scalars)
        if op.kind is Kind.VIEW:
            # Of what begins elsewhere now.
            results = tuple(replace(v, type=type_of(self.eager[v.id])) for v in results)
            self.now.update(zip((v.id for v in op.results), results, strict=True))
            made = replace(made, results=results)
        self.ops.append(made)

    def part(self, number: int) -> Part:
        graph = Graph(tuple(self.entered), tuple(self.ops), (self.now[number],))
        return Part(graph, self.inputs, self.eager)


def shows_it(part: Part, origin: Origin, plan: MakePlan, start: PrepareLaunch, scalars: list[float], numerics: str) -> bool:
    """Does a plan of the part by itself make something else of it than eager?"""
    values, executor, number = part.values(), executor_of(start), part.graph.outputs[0].id
    executor.run(executor.prepare(plan(part.graph)), values, scalars)
    got, eager = values[number], part.eager[number]
    if same_bits(got, eager):
        return False
    return numerics == "bitwise" or not origin.loose or far_from(got, eager, origin, scalars) is not None


def first_of(ran: Ran, fault: Fault, plan: MakePlan) -> Fault:
    """The fault at the first of the ops that a kernel computes, where the kernel shows that if it writes what it would have in
    registers only."""
    if fault.origin is None or fault.launch is None or not fault.launch.kernels:
        return fault
    ops, known = chain(fault.origin), {v.id for v in ran.graph.outputs}
    inner = [v for op in ops if op.kind is not Kind.VIEW for v in op.results if v.id not in known]
    graph = replace(ran.graph, outputs=(*ran.graph.outputs, *inner))
    found = Search(replace(ran, graph=graph, plan=plan(graph))).walk().fault
    # With so much to write the kernel may be another one, and the fault gone.
    if found is None or found.op not in ops:
        return fault
    return replace(found, launch=fault.launch)
