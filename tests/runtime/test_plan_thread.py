"""Operators that make plans for their thread are run in one of Kitsune's, which has made them beside the first step."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kitsune
from kitsune.ir import Op, in_own_thread
from kitsune.pipeline import Pipeline
from kitsune.runtime import ThreadPlans, calls, plan_thread as module, thread_plans
from kitsune.runtime.plan_thread import PlanThread, key_of
from tests.runtime.repeated import graphs
from tests.runtime.test_thread_plans import convolutions

CPU = torch.device("cpu")


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> Iterator[PlanThread]:
    one = PlanThread()
    one.start()
    for user in (module, calls, thread_plans):
        monkeypatch.setattr(user, "plan_thread", one)
    yield one
    one.close()


def backward() -> Op:
    return next(op for op in convolutions().ops if op.target._opname == "convolution_backward")


def in_time(condition: Callable[[], object]) -> None:
    until = time.perf_counter() + 20
    while not condition():
        assert time.perf_counter() < until
        time.sleep(0.001)


def test_a_call_runs_there_with_the_settings_of_here(plans: PlanThread) -> None:
    def look(x: torch.Tensor, *, more: int) -> Any:
        keys = torch._C._dispatch_tls_local_exclude_set().raw_repr()
        return x + more, threading.get_ident(), torch.is_grad_enabled(), keys

    for graded in (False, True):
        with torch.set_grad_enabled(graded), torch._C._AutoDispatchBelowAutograd():
            mine = torch._C._dispatch_tls_local_exclude_set().raw_repr()
            found, ident, seen, keys = plans.call(look, (torch.ones(2),), {"more": 2}, CPU)
        assert (found.tolist(), seen, keys) == ([3.0, 3.0], graded, mine) and ident != threading.get_ident()
    assert plans.call(torch._C._dispatch_tls_local_exclude_set, (), {}, CPU).raw_repr() != mine, "they are put back"


def test_what_it_raises_is_raised_here_and_nothing_is_kept(plans: PlanThread) -> None:
    class Mark:
        pass

    def fail(mark: Mark) -> None:
        raise ValueError("an operator of this kind")

    mark = Mark()
    gone = weakref.ref(mark)
    with pytest.raises(ValueError, match="of this kind"):
        plans.call(fail, (mark,), {}, CPU)
    del mark
    in_time(lambda: gone() is None)
    assert plans.call(int, ("3",), {}, CPU) == 3


def test_the_collector_rests_meanwhile_and_is_left_as_it_was(plans: PlanThread) -> None:
    assert not plans.call(gc.isenabled, (), {}, CPU) and gc.isenabled()
    gc.disable()
    try:
        assert not plans.call(gc.isenabled, (), {}, CPU) and not gc.isenabled()
    finally:
        gc.enable()


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("begun", [True, False])
def test_an_interrupt_leaves_nothing_behind_that_runs(plans: PlanThread, monkeypatch: pytest.MonkeyPatch, begun: bool) -> None:
    held, log = threading.Event(), []
    if not begun:
        plans.learn(backward(), lambda: held.wait(20))  # type: ignore[arg-type, return-value]

    class Lock:
        """The lock that says that the call is done; waiting for it is interrupted once, while the call runs or waits."""

        def __init__(self) -> None:
            self._lock, self._n = threading.Lock(), 0
            self.release = self._lock.release

        def acquire(self, blocking: bool = True) -> bool:
            self._n += 1
            if self._n == 2:
                in_time(lambda: log or not begun)
                raise Interrupted
            return self._lock.acquire(blocking)

    def work() -> None:
        log.append("begins")
        time.sleep(0.05)
        log.append("ends")

    init = module._Request.__init__

    def requested(self: Any, call: Any) -> None:
        init(self, call)
        self.done = Lock()
        self.done.acquire()

    monkeypatch.setattr(module._Request, "__init__", requested)
    with pytest.raises(Interrupted):
        plans.call(work, (), {}, CPU)
    assert log == (["begins", "ends"] if begun else []) and gc.isenabled()
    monkeypatch.undo()
    held.set()
    assert plans.call(int, ("3",), {}, CPU) == 3
    assert log == (["begins", "ends"] if begun else [])


def test_an_operator_is_known_until_its_plan_fails(plans: PlanThread) -> None:
    op, there = backward(), []
    assert not plans.knows(op)
    plans.learn(op, lambda: there.append(plans.knows(op)))
    assert plans.knows(op)
    assert plans.call(int, ("3",), {}, CPU) == 3
    assert there == [False], "there it is called as it is"

    def fail() -> None:
        raise torch.OutOfMemoryError("no memory")

    plans.learn(op, fail)
    in_time(lambda: not plans.knows(op))


def test_what_ran_in_another_thread_is_learned_once(plans: PlanThread) -> None:
    made = ThreadPlans(hands_over=True)
    made.seen(backward())
    assert not plans.known and made._known == {key_of(backward())}, "it ran in this very thread"
    others = ThreadPlans(hands_over=True)
    for _ in range(2):
        away = threading.Thread(target=others.seen, args=(backward(),))
        away.start()
        away.join()
    graph = convolutions()
    left = [op for op in graph.ops if op.target._opname == "convolution_backward" and key_of(op) != key_of(backward())]
    assert plans.known == {key_of(backward())} and left
    assert [op for op in others.needed(graph) if op.target._opname == "convolution_backward"] == left
    alone = ThreadPlans()
    plans.known.clear()
    away = threading.Thread(target=alone.seen, args=(backward(),))
    away.start()
    away.join()
    assert not plans.known, "without graphs each step would wait for another thread"


def test_steps_are_the_same_to_the_bit(plans: PlanThread, monkeypatch: pytest.MonkeyPatch) -> None:
    where: list[str] = []
    call = PlanThread.call

    def noted(self: PlanThread, target: Any, *rest: Any) -> Any:
        where.extend([target._opname] if isinstance(target, torch._ops.OpOverload) else [])
        return call(self, target, *rest)

    monkeypatch.setattr(PlanThread, "call", noted)
    # A CPU's backward runs in the thread of the program, unlike a GPU's.
    real = ThreadPlans.__init__

    def elsewhere(self: ThreadPlans, hands_over: bool = False, last_run: Any = None) -> None:
        real(self, hands_over)
        self._thread = -1

    monkeypatch.setattr(ThreadPlans, "__init__", elsewhere)

    y = torch.zeros(2, 2, 4, 4)

    def losses() -> list[float]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
        optimizer, x, found = torch.optim.SGD(model.parameters(), lr=0.1), torch.randn(2, 3, 8, 8), []
        for _ in range(12):
            loss = F.mse_loss(model(x), y)
            loss.backward()
            found.append(loss.detach())
            optimizer.step()
            optimizer.zero_grad()
        return [loss.item() for loss in found]

    # Each thread has its own number of helpers on a CPU, on which the order of sums depends.
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    plans.call(torch.set_num_threads, (1,), {}, CPU)
    try:
        check_steps(losses)
    finally:
        torch.set_num_threads(n)
    # Two in the second step, and in each capture.
    assert len(plans.known) == 2 and len(where) >= 4 and {*where} == {"convolution_backward"}


def check_steps(losses: Callable[[], list[float]]) -> None:
    eager = losses()
    with graphs(kernels=False), kitsune.config.patch(gate=False), kitsune.accelerate(device="cpu"):
        assert losses() == eager
        counters = kitsune.counters()
    assert counters["captured"] and counters["replayed"]


def test_where_nothing_is_captured_nothing_is_handed_over() -> None:
    for captures in (True, False):
        with contextlib.ExitStack() as stack:
            if captures:
                stack.enter_context(graphs(kernels=False))
            else:
                kitsune.reset()
            pipeline = Pipeline(CPU, 1)
            assert pipeline.runner.thread_plans._hands_over is captures


def test_its_number_is_nobodys_once_it_has_ended() -> None:
    one = PlanThread()
    one.start()
    own = one.call(in_own_thread, (), {}, CPU)
    one.close()
    found: list[bool] = []
    # Mostly one of these has the number that the first one had.
    go = threading.Event()

    def look() -> None:
        found.append(in_own_thread())
        go.wait(20)

    others = [threading.Thread(target=look) for _ in range(30)]
    for other in others:
        other.start()
    in_time(lambda: len(found) == len(others))
    go.set()
    for other in others:
        other.join()
    assert own and not any(found)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(256, 768), nn.Linear(256, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.view(8, 64, 4, 64).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.out(attended.transpose(1, 2).reshape(8, 64, 256))


def trained(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> list[float]:
    torch.manual_seed(0)
    model, x = make().cuda(), torch.randn(shape, device="cuda")
    optimizer, found = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True), []
    for _ in range(12):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(x).float().square().mean()
        loss.backward()
        found.append(loss.detach())
        optimizer.step()
    return [loss.item() for loss in found]


@pytest.mark.gpu
@pytest.mark.parametrize("aside", [False, True], ids=["stream", "another stream"])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Sequential(*(nn.Conv2d(16, 16, 3, padding=1) for _ in range(3))), (8, 16, 32, 32)),
        (lambda: nn.Sequential(*(Attention() for _ in range(3))), (8, 64, 256)),
    ],
    ids=["convolutions", "attention"],
)
def test_graphs_that_it_has_launched_into_have_eagers_bits(
    make: Callable[[], nn.Module], shape: tuple[int, ...], aside: bool
) -> None:
    kitsune.reset()
    with (
        torch.backends.cudnn.flags(enabled=True, deterministic=True),
        torch.cuda.stream(torch.cuda.Stream() if aside else torch.cuda.current_stream()),
    ):
        eager = trained(make, shape)
        with kitsune.config.patch(gate=False), kitsune.accelerate(device="cuda", numerics="bitwise"):
            assert trained(make, shape) == eager
    counters = kitsune.counters()
    assert counters["captured"] and counters["replayed"] and not counters["graph_refused"]
