"""Lack of memory, injected at every instruction: the result is right, or the error is told, and nothing is written twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kitsune
from kitsune.ir import Kind, storage_of
from kitsune.memory.pool import MemoryPool
from kitsune.runtime import PlanExecutor, fallback
from kitsune.runtime.frame import POISON
from kitsune.runtime.instructions import Instruction
from tests.runtime.checked import FLAVORS, assert_equal, copied, executor, outcome, record
from tests.runtime.naive import FakeLaunch, plan_of
from tests.runtime.test_plan_executor import Broken

NO_MEMORY = "CUDA out of memory. (injected)"


class Fails(Instruction):
    """Runs out of memory a number of times before it works."""

    def __init__(self, inner: Instruction, times: int) -> None:
        super().__init__(commits=inner.commits, repeats=inner.repeats)
        self.inner, self.times = inner, times

    def run(self, frame: Any) -> None:
        if self.times:
            self.times -= 1
            raise torch.OutOfMemoryError(NO_MEMORY)
        self.inner.run(frame)


class Full(MemoryPool):
    """Has no room a number of times."""

    def __init__(self, times: int) -> None:
        super().__init__(1 << 20)
        self.times = self.freed = 0
        self.times = times

    def take(self, *args: Any) -> Any:
        if self.times:
            self.times -= 1
            raise torch.OutOfMemoryError(NO_MEMORY)
        return super().take(*args)

    def free_all(self) -> None:
        self.freed += 1
        super().free_all()


def writes() -> Any:
    x, w = torch.arange(24.0).view(4, 6) / 7, torch.arange(36.0).view(6, 6) / 5
    kitsune.flush()
    a = (x + 1) @ w
    b = torch.cat([a, a.exp()])
    x.mul_(0.5)
    c = a @ w + torch.rand(4, 6)
    x[1:3].add_(c[1:3])
    return (b * 2).t(), c + x, x[0]


@pytest.fixture
def region() -> Any:
    torch.manual_seed(3)
    return record(writes)


@pytest.mark.parametrize("flavor", FLAVORS, ids=lambda f: "_".join(k for k, on in f.items() if on) or "calls")
def test_memory_that_is_lacking_once_is_made(flavor: Any, region: Any) -> None:
    graph, values, scalars = region
    state = torch.get_rng_state()
    expected = outcome(graph, values, scalars)
    after = torch.get_rng_state()
    it, told = executor()
    prepared = it.prepare(plan_of(graph, **flavor))
    instructions = prepared.instructions
    assert 0 < prepared.first_commit < len(instructions) - 2
    for k, instruction in enumerate(instructions):
        prepared.instructions = (*instructions[:k], Fails(instruction, 1), *instructions[k + 1 :])
        got = copied(values)
        torch.set_rng_state(state)
        it.run(prepared, got, scalars)
        assert torch.equal(torch.get_rng_state(), after)
        assert_equal(graph, expected, got)
        assert len(told) == min(k, prepared.first_commit) + 1
        assert it.pool.statistics.held_bytes == (0 if k <= prepared.first_commit else it.pool.statistics.held_bytes)  # type: ignore


def test_memory_that_is_lacking_twice_is_an_error_only_after_a_write(region: Any) -> None:
    graph, values, scalars = region
    it, _ = executor()
    prepared = it.prepare(plan_of(graph))
    instructions = prepared.instructions
    for k, instruction in enumerate(instructions):
        prepared.instructions = (*instructions[:k], Fails(instruction, 2), *instructions[k + 1 :])
        if k <= prepared.first_commit:
            it.run(prepared, copied(values), scalars)
        else:
            with pytest.raises(torch.OutOfMemoryError):
                it.run(prepared, copied(values), scalars)
        assert it.pool.statistics.used_bytes == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("times", [1, 2])
def test_no_room_for_the_arena(times: int, region: Any) -> None:
    graph, values, scalars = region
    state = torch.get_rng_state()
    expected = outcome(graph, values, scalars)
    pool = Full(times)
    it, told = executor(pool=pool)
    prepared = it.prepare(plan_of(graph))
    for _ in range(2):
        got = copied(values)
        torch.set_rng_state(state)
        it.run(prepared, got, scalars)
        assert_equal(graph, expected, got)
    assert pool.freed == (1 if times == 1 else 2)
    assert len(told) == times - 1
    assert all("one by one" in sentence for sentence in told)


def test_a_call_that_may_have_written_half_is_not_made_again() -> None:
    xs = [torch.zeros(2), torch.zeros(3)]
    graph, values, scalars = record(lambda: torch._foreach_add_(xs, 1.5))
    it, _ = executor()
    prepared = it.prepare(plan_of(graph))
    prepared.instructions = tuple(Fails(i, 1) if not i.repeats else i for i in prepared.instructions)
    with pytest.raises(torch.OutOfMemoryError):
        it.run(prepared, copied(values), scalars)


@pytest.mark.parametrize("times", [1, 2])
def test_a_broken_kernel_runs_out_of_memory(times: int, region: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, values, scalars = region
    state = torch.get_rng_state()
    expected = outcome(graph, values, scalars)
    original, n_calls = fallback.call, [0]
    for k in range(12):

        def call(op: Any, *rest: Any, k: int = k) -> None:
            n_calls[0] += op.kind is not Kind.VIEW
            if op.kind is not Kind.VIEW and k < n_calls[0] <= k + times:
                raise torch.OutOfMemoryError(NO_MEMORY)
            original(op, *rest)

        monkeypatch.setattr(fallback, "call", call)
        it, _ = executor(Broken)
        got, n_calls[0] = copied(values), 0
        prepared = it.prepare(plan_of(graph, most=2))
        torch.set_rng_state(state)
        try:
            it.run(prepared, got, scalars)
        except torch.OutOfMemoryError:
            assert times == 2
        else:
            assert_equal(graph, expected, got)


class Moves:
    """Makes room as graphs do that are destroyed: their results that are held, and nobody else looks at, are moved."""

    def __init__(self, values: list[Any]) -> None:
        self.n_moved = 0
        storages = {storage_of(t)._cdata: storage_of(t) for t in values if t is not None}
        on_each = {key: [t for t in values if t is not None and storage_of(t)._cdata == key] for key in storages}
        self.known = [(storage, on_each[key]) for key, storage in storages.items()]
        self.counts = [torch._C._storage_Use_Count(key) for key in storages]

    def __call__(self) -> None:
        for (storage, tensors), count in zip(self.known, self.counts, strict=True):
            if torch._C._storage_Use_Count(storage._cdata) != count:
                continue
            memory = storage.clone()
            for t in tensors:
                torch.ops.aten.set_.source_Storage_storage_offset(t, memory, t.storage_offset(), t.shape, t.stride())
            storage.fill_(POISON)
            self.n_moved += 1


@pytest.mark.parametrize("where", ["arena", "instruction", "broken kernel"])
@pytest.mark.parametrize("flavor", FLAVORS, ids=lambda f: "_".join(k for k, on in f.items() if on) or "calls")
def test_inputs_that_are_moved_to_make_room_are_found(
    where: str, flavor: Any, region: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, values, scalars = region
    state = torch.get_rng_state()
    expected = outcome(graph, values, scalars)
    n_moved, original = 0, fallback.call
    for k in range(12):
        n_calls, got, told = [0], copied(values), list[str]()
        moves = Moves(got)

        def call(op: Any, *rest: Any, k: int = k, n_calls: list[int] = n_calls) -> None:
            n_calls[0] += op.kind is not Kind.VIEW
            if op.kind is not Kind.VIEW and n_calls[0] == k + 1:
                raise torch.OutOfMemoryError(NO_MEMORY)
            original(op, *rest)

        if where == "broken kernel":
            monkeypatch.setattr(fallback, "call", call)
        # The kernels behind it look for their operands by address.
        starts = iter([Broken] if where == "broken kernel" else [])
        start = lambda launch, starts=starts: next(starts, FakeLaunch)(launch)  # noqa: E731
        it = PlanExecutor(start, Full(where == "arena"), told.append, moves)
        prepared = it.prepare(plan_of(graph, **flavor))
        if where == "instruction" and k < len(prepared.instructions):
            instructions = list(prepared.instructions)
            instructions[k] = Fails(instructions[k], 1)
            prepared.instructions = tuple(instructions)
        torch.set_rng_state(state)
        it.run(prepared, got, scalars)
        assert_equal(graph, expected, got)
        n_moved += moves.n_moved
    assert n_moved or (where == "arena" and not flavor["arena"]) or (where == "broken kernel" and not flavor["kernels"])
