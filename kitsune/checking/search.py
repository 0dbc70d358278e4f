"""Where a region's plan first goes wrong: the plan is run launch by launch beside the recorded operators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from kitsune.checking.compare import difference, same_bits
from kitsune.checking.eager_run import MEMORY, EagerRun, Origin, Wrong
from kitsune.checking.inputs import Draws, Start
from kitsune.checking.plan_run import PlanRun, apart, executor_of, made_by, operands_of, views_by_base
from kitsune.ir import Graph, Kind, Launch, Op, Plan, Value


@dataclass(frozen=True)
class Ran:
    """A run that has ended: what it began with, what it left (`values`), and the generator's states before and after.

    `plan` is what was run, and `prepare_launch` makes its kernels ready; `numerics` is its grade. `how` says
    how it was run, for a sentence.
    """

    graph: Graph
    start: Start
    values: list[Any]
    scalars: list[float]
    before: torch.Tensor
    after: torch.Tensor
    device: torch.device
    plan: Plan
    prepare_launch: Callable[[Launch], Any]
    numerics: str
    how: str = "as a whole"


@dataclass(frozen=True)
class Fault:
    """The first thing that a plan does wrong: a sentence, and the recorded op whose value it is. `origin` is how that came about,
    where it is the value that is computed otherwise."""

    op: Op | None
    launch: Launch | None
    sentence: str
    origin: Origin | None = None


@dataclass(frozen=True)
class Walk:
    """What came of going through a plan: the fault, or the values that it left, by number."""

    fault: Fault | None
    values: list[Any]


class _Found(Exception):
    def __init__(self, fault: Fault) -> None:
        self.fault = fault


class Search:
    """One way through a plan, in step with the recorded operators and, where the plan has an arena, with itself without one."""

    def __init__(self, ran: Ran) -> None:
        self.graph, self.plan = ran.graph, ran.plan
        executor = executor_of(ran.prepare_launch)
        self._free = PlanRun(executor, executor.prepare(apart(ran.plan)), ran.start.values(), ran.scalars)
        packed = ran.plan.arena > 0
        self._packed = PlanRun(executor, executor.prepare(ran.plan), ran.start.values(), ran.scalars) if packed else None
        self._eager = EagerRun(ran.graph, ran.start.values(), ran.scalars, ran.device, ran.numerics)
        self._eager.state = self._state = ran.before
        self._draws = Draws(ran.device)
        self._makers = {v.id: op for graph in (ran.plan.graph, ran.graph) for op in graph.ops for v in op.outputs}
        self._unset = {v.storage for op in ran.plan.graph.ops if op.target._opname.startswith(MEMORY) for v in op.results}
        self._launches: dict[int, Launch] = {}
        self._expect()

    def _expect(self) -> None:
        """Which values the plan and the recorded operators have in common."""
        recorded = {v.id: v for op in self.graph.ops if op.kind is not Kind.VIEW for v in op.outputs}
        views = views_by_base(self.plan.graph)
        for launch in self.plan.launches:
            for value in made_by(launch, views):
                known = recorded.get(value.id)
                if known is None or known.type.shape != value.type.shape or known.type.dtype is not value.type.dtype:
                    continue
                self._eager.awaited.add(value.id)
                self._launches[value.id] = launch
                if launch.op is not None:
                    self._eager.called.add(value.id)

    def walk(self) -> Walk:
        """Go through it. Raises what an operator raises."""
        try:
            for launch in self.plan.launches:
                self._step(launch)
            self._eager.advance()
            if self._eager.next is not None:
                raise _Found(Fault(self._eager.next, None, "the plan does not compute it"))
            left = self._packed or self._free
            return Walk(None, left.finish())
        except Wrong as wrong:
            return Walk(Fault(wrong.op, self._launches.get(wrong.value.id), wrong.sentence, wrong.origin), [])
        except _Found as found:
            return Walk(found.fault, [])
        finally:
            self._free.close()
            if self._packed is not None:
                self._packed.close()

    def _step(self, launch: Launch) -> None:
        for value in operands_of(launch):
            self._look_at_operand(launch, value)
        before = self._draws.now()
        self._draws.set(self._state)
        made = self._free.step()
        after = self._draws.now()
        if self._packed is not None:
            self._draws.set(self._state)
            self._packed.step()
            for value in made:
                self._look_at_result(launch, value)
        self._state = after
        self._draws.set(before)
        for value in made:
            self._eager.give(value, self._free.look(value))
        self._eager.advance()

    def _look_at_operand(self, launch: Launch, value: Value) -> None:
        """Is what a launch is about to read still what was made?"""
        there = self._free.look(value)
        if there is None:
            raise _Found(Fault(self._makers.get(value.id), launch, f"it is read by {_named(launch)} before it has been made"))
        if self._packed is None or value.storage in self._unset:
            return
        here = self._packed.look(value)
        if here is None or not same_bits(here, there):
            told = "has no memory" if here is None else difference(here, there)
            sentence = f"its memory in the arena is written by something else before {_named(launch)} reads it: {told}"
            raise _Found(Fault(self._makers.get(value.id), launch, sentence))

    def _look_at_result(self, launch: Launch, value: Value) -> None:
        assert self._packed is not None
        here, there = self._packed.look(value), self._free.look(value)
        if here is None or there is None or value.storage in self._unset or same_bits(here, there):
            return
        if launch.op is None:
            sentence = f"{_named(launch)} computes it otherwise in the plan's arena than in memory of its own: "
            raise _Found(Fault(self._makers.get(value.id), launch, sentence + difference(here, there)))
        # The library's results may differ from run to run.
        here.copy_(there)


def _named(launch: Launch) -> str:
    return f"the kernel {launch.name}" if launch.kernels else f"aten.{launch.name}"
