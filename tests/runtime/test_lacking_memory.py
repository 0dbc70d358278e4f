"""What is kept for recorded steps leaves a program too little memory: it is given back, and the call is made again."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import kitsune
from kitsune.ir import storage_of
from kitsune.lazy import at_once
from kitsune.memory.pool import MemoryPool
from kitsune.runtime import prepare, replay
from kitsune.runtime.calls import call_of
from kitsune.runtime.lent_outputs import Lent
from tests.runtime.backends import assert_equal, lazily, runner, small_training
from tests.runtime.checked import copied, outcome, record
from tests.runtime.repeated import Repeated, Repeater, counts, graphs

aten = torch.ops.aten
# The package has its function by this name.
replaying = sys.modules["kitsune.runtime.replay"]
LET_GO = "Memory ran out: what was kept for later steps, graphs too, was given back, and a call repeated."


class Full:
    """No memory for some calls while anything is kept; `n_refused` counts them, `always` makes them fail for good."""

    def __init__(self, repeater: Repeater, always: bool) -> None:
        self.repeater, self.always, self.n_refused, self.is_on = repeater, always, 0, False

    def ask(self, wanted: bool = True) -> None:
        pool = runner().pool if self.is_on else None
        kept = self.repeater.n_alive or (pool is not None and pool.statistics.held_bytes)
        if self.is_on and wanted and (kept or self.always):
            self.n_refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory. (injected)")


def train(context: Any, full: Full | None = None) -> list[torch.Tensor]:
    """Steps, a look at the model with which memory is full, and steps again."""
    model, optimizer, x, target = small_training()
    kept = []
    with context:
        for step in range(14):
            loss = F.cross_entropy(model(x), target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            kept.append(loss)
            if step == 6:
                if full is not None:
                    assert full.repeater.n_alive
                    full.is_on = True
                with torch.no_grad():
                    kept += [(model(x) @ model(x).t()).erf() @ model(x) for _ in range(2)]
                    kept[-1].sum().item()
                if full is not None:
                    full.is_on = False
    return [*(k.detach() for k in kept), *model.parameters(), torch.rand(3)]


@contextmanager
def in_ops_by_name(full: Full) -> Iterator[None]:
    original = at_once._made

    def made(recorder: Any, row: Any, *rest: Any) -> Any:
        full.ask(row.target is aten.erf.default)
        return original(recorder, row, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(at_once, "_made", made)
        yield


@contextmanager
def in_regions(full: Full) -> Iterator[None]:
    def made(op: Any, *rest: Any) -> None:
        full.ask(op.target is aten.erf.default)
        call_of(op)(op, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replaying, "call_of", lambda op: made)
        yield


@contextmanager
def in_arenas(full: Full) -> Iterator[None]:
    original = MemoryPool.take

    def take(*args: Any) -> Any:
        full.ask()
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoryPool, "take", take)
        yield


# Where memory runs out, whether kernels run the regions, and how many runs of an op it takes to know it.
WAYS: dict[str, tuple[Callable[[Full], Any], bool, int]] = {
    "an op that is observed": (in_ops_by_name, False, 1),
    "an op that is observed, beside plans": (in_ops_by_name, True, 1),
    "a region op by op": (in_regions, False, 0),
    "a region by plan": (in_arenas, True, 0),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_graphs_and_arenas_make_way(way: tuple[Callable[[Full], Any], bool, int]) -> None:
    injected, kernels, warmup = way
    expected = train(kitsune.disable())
    with graphs(kernels) as repeater:
        full = Full(repeater, always=False)
        with injected(full):
            got = train(lazily(warmup=warmup), full)
        assert_equal(got, expected)
        assert full.n_refused == 1
        assert LET_GO in kitsune.explain().notes and not kitsune.explain().mended
        # They come back.
        assert repeater.n_alive > 0 and counts("captured")[0] >= 2


def test_a_plan_finds_a_held_result_of_a_graph_where_that_was_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Repeated.destroy

    def destroy(self: Repeated) -> None:
        for t in self._memory:
            storage_of(t).fill_(0x55)
        original(self)

    x, w = torch.arange(64.0).view(8, 8) / 64, torch.eye(8) + 0.5
    with kitsune.disable():
        h = (x @ w + 1) * 2
        expected = ((h + 1) @ w - (h - 1) @ w) @ w + h
    monkeypatch.setattr(Repeated, "destroy", destroy)
    with graphs() as repeater, kitsune.config.patch(gate=False):
        full = Full(repeater, always=False)
        with in_arenas(full), lazily():
            for _ in range(6):
                h = (x @ w + 1) * 2
                kitsune.flush()
            assert counts("replayed")[0] > 0 and repeater.n_alive
            full.is_on = True
            y = ((h + 1) @ w - (h - 1) @ w) @ w + h
            kitsune.flush()
            full.is_on = False
            assert full.n_refused == 1 and not repeater.n_alive
            assert torch.equal(y, expected)


def test_arenas_go_before_results_that_are_held_are_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    original, held = Lent.release, []

    def release(lent: Lent) -> bool:
        if full.is_on:
            held.append((runner().pool.statistics.held_bytes, len(runner().arenas._alive)))
        return original(lent)

    monkeypatch.setattr(Lent, "release", release)
    with graphs() as repeater:
        full = Full(repeater, always=False)
        with in_ops_by_name(full):
            train(lazily(warmup=1), full)
    assert held and set(held) == {(0, 0)}


@pytest.mark.parametrize("way", [WAYS["an op that is observed"], WAYS["a region op by op"]], ids=["observed", "op by op"])
def test_an_error_is_told_where_that_does_not_help(way: tuple[Callable[[Full], Any], bool, int]) -> None:
    injected, kernels, warmup = way
    with graphs(kernels) as repeater:
        full = Full(repeater, always=True)
        with injected(full), pytest.raises(torch.OutOfMemoryError, match="injected"):
            train(lazily(warmup=warmup), full)
        assert full.n_refused == 2 and repeater.n_alive == 0
        full.is_on = False
        assert_equal(train(lazily(warmup=warmup)), train(kitsune.disable()))


def program() -> Any:
    x, w = torch.arange(24.0).view(4, 6) / 7, torch.arange(36.0).view(6, 6) / 5
    kitsune.flush()
    b = torch.cat([(x + 1) @ w, x.exp()])
    x.mul_(0.5)
    c = b[:4] @ w + torch.rand(4, 6)
    x[1:3].add_(c[1:3])
    ys = [torch.zeros(3), torch.ones(2)]
    torch._foreach_add_(ys, 1.5)
    return b.t(), c + x, ys, torch.randperm(4)


# When they run out of memory they may have written the first of their operands, or drawn.
BEGUN = {aten._foreach_add_.Scalar, aten.randperm.default}


@pytest.mark.parametrize("times", [1, 2])
def test_each_op_of_a_region_is_tried_once_more(times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    graph, values, scalars = record(program)
    state = torch.get_rng_state()
    expected = outcome(graph, values, scalars)
    after, n_calls, fails_at, relieved = torch.get_rng_state(), [0], [0], [0]

    def failing(op: Any, *rest: Any) -> None:
        n_calls[0] += 1
        if fails_at[0] < n_calls[0] <= fails_at[0] + times:
            raise torch.OutOfMemoryError("injected")
        call_of(op)(op, *rest)

    def relieve() -> None:
        relieved[0] += 1

    monkeypatch.setattr(replaying, "call_of", lambda op: failing)
    schedule = prepare(graph)
    called = [instruction.op for instruction in schedule.instructions if instruction.make is not None]
    for k, op in enumerate(called):
        got, fails_at[0], n_calls[0], relieved[0] = copied(values), k, 0, 0
        torch.set_rng_state(state)
        if times == 2 or op.target in BEGUN:
            with pytest.raises(torch.OutOfMemoryError, match="injected"):
                replay(schedule, got, scalars, relieve)
            assert relieved[0] == (op.target not in BEGUN)
            continue
        replay(schedule, got, scalars, relieve)
        assert_equal_values(graph, expected, got)
        assert relieved[0] == 1 and torch.equal(torch.get_rng_state(), after)
    assert {op.target for op in called} > BEGUN and aten.rand.default in {op.target for op in called}


def assert_equal_values(graph: Any, expected: list[Any], got: list[Any]) -> None:
    for value in (*graph.inputs, *graph.outputs):
        assert torch.equal(expected[value.id], got[value.id])


def test_a_call_at_once_that_may_have_written_half_is_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    original, failures = at_once._made, [torch.OutOfMemoryError("injected")]

    def made(recorder: Any, row: Any, *rest: Any) -> Any:
        result = original(recorder, row, *rest)
        if row.target is aten._foreach_add_.Scalar and failures:
            raise failures.pop()
        return result

    monkeypatch.setattr(at_once, "_made", made)
    xs = [torch.zeros(2), torch.zeros(3)]
    with lazily(warmup=1), pytest.raises(torch.OutOfMemoryError, match="injected"):
        torch._foreach_add_(xs, 1.5)
    assert not failures and [x.tolist() for x in xs] == [[1.5] * 2, [1.5] * 3]


@pytest.mark.parametrize(("draw", "draws_last"), [(torch.randperm, False), (torch.rand, True)])
def test_a_call_at_once_that_may_have_drawn_is_not_made_again(
    draw: Any, draws_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, n_made = at_once._made, [0]

    def made(recorder: Any, row: Any, *rest: Any) -> Any:
        n_made[0] += 1
        if n_made[0] == 1:
            raise torch.OutOfMemoryError("injected")
        return original(recorder, row, *rest)

    torch.manual_seed(5)
    expected = draw(9).tolist()
    torch.manual_seed(5)
    with lazily(warmup=1):
        monkeypatch.setattr(at_once, "_made", made)
        try:
            drawn = draw(9).tolist()
        except torch.OutOfMemoryError:
            drawn = None
        monkeypatch.undo()
    assert drawn == (expected if draws_last else None) and (n_made[0] > 1) == draws_last


def into(x: torch.Tensor, y: torch.Tensor) -> None:
    torch.neg(x, out=y)


def resized(x: torch.Tensor, y: torch.Tensor) -> None:
    y.resize_(x.shape)


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
@pytest.mark.parametrize("call", [into, resized])
def test_a_call_that_gave_an_operand_its_geometry_is_not_made_again(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    n_made = [0]

    def made(recorder: Any, row: Any, *rest: Any) -> Any:
        n_made[0] += 1
        raise torch.OutOfMemoryError("injected")

    x, y = torch.zeros(64), torch.zeros(2)
    with lazily(warmup=1):
        monkeypatch.setattr(at_once, "_made", made)
        # Torch sets the sizes first: a second call finds them as they are to be, and asks for no memory.
        with pytest.raises(torch.OutOfMemoryError, match="injected"):
            call(x, y)
        monkeypatch.undo()
    assert n_made == [1]
