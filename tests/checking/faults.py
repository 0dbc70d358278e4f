"""Ways in which a planner or a kernel may be wrong, each to be put in for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from kitsune.ir import Access, Graph, Launch
from kitsune.planning import Planner
from tests.runtime.naive import at_address
from tests.runtime.test_real_plans import Walk

aten = torch.ops.aten


class Off(Walk):
    """Kernels in which one operator is off by a little."""

    OP = "exp"

    def _step(self, step: Any, *rest: Any) -> list[torch.Tensor]:
        found = super()._step(step, *rest)
        return [t * (1 + 2**-20) for t in found] if step.op.target._opname == self.OP else found


class LastElement(Walk):
    """Kernels that write zero where the last element belongs."""

    def _run(self, kernel: Any, address: Callable[[Access], int], scalars: list[float]) -> None:
        super()._run(kernel, address, scalars)
        for access in (store.access for store in kernel.stores):
            at_address(address(access), access.value.type.dtype, kernel.domain, access.strides)[(-1,) * len(kernel.domain)] = 0


class Nothing(Walk):
    """Kernels that do nothing."""

    def _run(self, *args: Any) -> None:
        pass


class WritesWhatItReads(Walk):
    """Kernels that write what they only read, too."""

    def _run(self, kernel: Any, address: Callable[[Access], int], scalars: list[float]) -> None:
        super()._run(kernel, address, scalars)
        stored = {s.access.value.storage for s in kernel.stores}
        for access in kernel.loads:
            if access.value.storage not in stored:
                at_address(address(access), access.value.type.dtype, (1,), (1,)).add_(1)


class Draws(Walk):
    """Kernels that draw a random number nobody asked for."""

    def start(self, *args: Any) -> None:
        super().start(*args)
        torch.rand(())


def casts_dropped(graph: Graph) -> Graph:
    """A pass that takes a cast to 16 bits and back for nothing."""
    makers = {v.id: op for op in graph.ops for v in op.results}
    ops = []
    for op in graph.ops:
        first = makers.get(op.inputs[0].id) if op.target is aten._to_copy.default else None
        if first is not None and first.target is op.target and first.inputs[0].type.dtype is op.results[0].type.dtype:
            source = first.inputs[0]
            op = replace(op, target=aten.clone.default, args=(source,), kwargs=(), inputs=(source,))
        ops.append(op)
    return replace(graph, ops=tuple(ops))


def edges_dropped(launches: list[Launch]) -> list[Launch]:
    """Launches in an order in which a write comes before a read of what was there."""
    for k in range(1, len(launches)):
        written = {storage for op in launches[k].ops for storage in op.effects.writes}
        read = {v.storage for op in launches[k - 1].ops for v in op.inputs}
        if written & read and launches[k].op is not None and launches[k - 1].op is not None:
            return [*launches[: k - 1], launches[k], launches[k - 1], *launches[k + 1 :]]
    return launches


@contextlib.contextmanager
def planner_that(fault: str) -> Iterator[None]:
    """Plans are made with a fault: "drops casts", "drops edges" or "reuses memory"."""
    import kitsune.planning as planning

    in_order, assign_offsets = planning.in_order, planning.assign_offsets
    with pytest.MonkeyPatch.context() as patch:
        if fault == "drops casts":
            patch.setattr(Planner, "lists_taken_apart", lambda self, graph: casts_dropped(graph))
        elif fault == "drops edges":
            patch.setattr(planning, "in_order", lambda graph, *rest: edges_dropped(list(in_order(graph, *rest))))
        elif fault == "reuses memory":

            def at_zero(*args: Any) -> tuple[dict[int, int], int]:
                offsets, arena = assign_offsets(*args)
                return dict.fromkeys(offsets, 0), arena

            patch.setattr(planning, "assign_offsets", at_zero)
        else:
            raise ValueError(fault)
        yield
