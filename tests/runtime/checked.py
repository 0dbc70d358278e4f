"""Regions run by plans and, on copies of their inputs, by replay; both must leave the same."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import kitsune
from kitsune.dispatch import below_autograd
from kitsune.ir import Graph, Launch, Plan, storage_of
from kitsune.memory.pool import MemoryPool
from kitsune.pipeline import Pipeline
from kitsune.runtime import PlanExecutor, prepare, replay
from tests import _compare
from tests.runtime.naive import FakeLaunch, plan_of

aten = torch.ops.aten
SKIP = ("requires_grad", "history", "is_leaf")
FLAVORS = [{"kernels": k, "arena": a} for k in (False, True) for a in (False, True)]
Values = list[Any]
# The methods themselves: while a context is open the generator's are doors.
get_state, set_state = torch.Generator.get_state, torch.Generator.set_state


def forget() -> None:
    """Forget the pipelines as well, which have got hold of how regions are run."""
    kitsune.reset()
    kitsune.session._thread.pipelines.clear()


def executor(start: Callable[[Launch], Any] = FakeLaunch, pool: Any = None) -> tuple[PlanExecutor, list[str]]:
    told: list[str] = []
    return PlanExecutor(start, MemoryPool(1 << 20) if pool is None else pool, told.append), told


def copied(values: Values) -> Values:
    """The same tensors over other memory, those that share memory sharing it again."""
    memory: dict[int, Any] = {}
    found: Values = []
    for t in values:
        if t is None:
            found.append(None)
            continue
        storage = storage_of(t)
        again = memory.setdefault(storage._cdata, storage.clone())
        twin = torch.empty(0, dtype=t.dtype)
        aten.set_.source_Storage_storage_offset(twin, again, torch._C.TensorBase.storage_offset(t), t.shape, t.stride())
        torch._C._set_conj(twin, t.is_conj())
        torch._C._set_neg(twin, t.is_neg())
        found.append(twin)
    return found


def never_written(graph: Graph) -> set[int]:
    """The values whose memory holds what was there before: an op has allocated it and none writes it."""
    empty = {v.storage for op in graph.ops if "empty" in str(op.target) for v in op.results}
    empty -= {storage for op in graph.ops for storage in op.effects.writes}
    return {v.id for op in graph.ops for v in op.results if v.storage in empty}


def assert_equal(graph: Graph, expected: Values, got: Values) -> None:
    numbers = [v.id for v in (*graph.inputs, *graph.outputs)]
    garbage = never_written(graph)
    for number in numbers:
        values_of = None if number in garbage else _compare.value_difference
        assert not (told := _compare.difference(expected[number], got[number], values=values_of, skip=SKIP)), (
            f"${number}: {told}\n{graph}"
        )
    storages = [[storage_of(values[n])._cdata for n in numbers] for values in (expected, got)]
    there, here = ([s.index(x) for x in s] for s in storages)
    assert there == here, f"aliases of {numbers}: {here} instead of {there}"


class Checked:
    """Runs regions by plans, and by replay on copies, and compares."""

    def __init__(self, start: Any = FakeLaunch, plan: Callable[[Graph], Plan] | None = None, **flavor: Any) -> None:
        self.plan = plan or (lambda graph: plan_of(graph, **flavor))
        self.n_kernels = 0
        self.executor, self.told = executor(start)
        self.prepared: dict[Graph, Any] = {}
        # What went wrong, for programs that swallow exceptions.
        self.wrong: list[str] = []

    def run(self, graph: Graph, values: Values, scalars: list[float]) -> None:
        try:
            self._run(graph, values, scalars)
        except AssertionError as error:
            self.wrong.append(str(error))
            raise

    def _run(self, graph: Graph, values: Values, scalars: list[float]) -> None:
        with below_autograd(), torch._C._DisableTorchDispatch():
            expected, state = copied(values), get_state(torch.default_generator)
            failure = _error_of(lambda: replay(prepare(graph), expected, scalars))
            after = get_state(torch.default_generator)
            set_state(torch.default_generator, state)
            prepared = self.prepare(graph)
            error = _error_of(lambda: self.executor.run(prepared, values, scalars))
            assert type(error) is type(failure), f"{error!r} instead of {failure!r} in\n{graph}"
            if error is not None:
                raise error
            assert torch.equal(get_state(torch.default_generator), after), "the generator's state"
            assert_equal(graph, expected, values)

    def prepare(self, graph: Graph) -> Any:
        if graph not in self.prepared:
            plan = self.plan(graph)
            self.n_kernels += sum(bool(launch.kernels) for launch in plan.launches)
            self.prepared[graph] = self.executor.prepare(plan)
        return self.prepared[graph]


def _error_of(run: Callable[[], None]) -> Exception | None:
    try:
        run()
    except Exception as error:
        return error
    return None


@contextlib.contextmanager
def checked(monkeypatch: pytest.MonkeyPatch, **flavor: Any) -> Iterator[Checked]:
    """Regions are run by a Checked."""
    forget()
    it = Checked(**flavor)
    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "run_graph", lambda self, graph, values, scalars: it.run(graph, values, scalars))
        yield it
    forget()


def record(program: Callable[[], Any], warmup: int = 0) -> tuple[Graph, Values, list[float]]:
    """The last region of a program, its inputs and its scalars; with a warm-up, after the program has been observed."""
    seen: list[Any] = []

    def run(self: Any, graph: Graph, values: Values, scalars: list[float]) -> None:
        with below_autograd(), torch._C._DisableTorchDispatch():
            seen.append((graph, copied(values), list(scalars)))
            replay(prepare(graph), values, scalars)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pipeline, "run_graph", run)
        forget()
        for _ in range(1 + warmup):
            with kitsune.accelerate(warmup=warmup, device="cpu"):
                kept = program()
            del kept
    forget()
    return seen[-1]


def outcome(graph: Graph, values: Values, scalars: list[float]) -> Values:
    values = copied(values)
    replay(prepare(graph), values, scalars)
    return values
