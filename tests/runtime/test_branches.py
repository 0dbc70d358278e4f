"""Plans on several streams give the same results in whatever order the streams run, and as branches of a CUDA graph."""

from __future__ import annotations

import contextlib
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F

import kitsune
from kitsune.ir import Graph, Plan, happens_before
from kitsune.planning import plan_for
from kitsune.runtime.branches import Branches
from kitsune.runtime.frame import Frame
from kitsune.runtime.instructions import Allocate, Call, CallInto, Instruction, Start
from kitsune.scheduler import streams
from tests.property import steps, steps_autograd  # noqa: F401  (they fill the table)
from tests.property.strategies import programs
from tests.property.test_programs import SLOW
from tests.property.world import Program
from tests.runtime.checked import checked, executor, record
from tests.runtime.test_real_plans import Walk

# Launches that were put on another stream than the first, in all programs.
n_forked = 0


def in_another_order(plan: Plan, rng: random.Random) -> Plan:
    """The plan with its launches in another order in which its streams might run them."""
    before, done, order = happens_before(plan.launches), 0, []
    # A view starts nothing: it is made when its turn has come.
    before = [(1 << k) - 1 if launch.host_only else before[k] for k, launch in enumerate(plan.launches)]
    while len(order) < len(plan.launches):
        ready = [k for k, needs in enumerate(before) if not done >> k & 1 and not needs & ~done]
        order.append(rng.choice(ready))
        done |= 1 << order[-1]
    launches = tuple(replace(plan.launches[k], stream=0, waits=()) for k in order)
    return replace(plan, launches=launches, drops=())


@settings(SLOW, max_examples=80)
@given(program=programs(), seed=st.integers(0, 1000))
def test_any_order_of_the_streams_gives_the_same(program: Program, seed: int) -> None:
    rng = random.Random(seed)

    def plan(graph: Graph) -> Plan:
        global n_forked
        with kitsune.config.patch(streams=4):
            made = plan_for(graph, "sm_90")
        n_forked += sum(launch.stream > 0 for launch in made.launches)
        return in_another_order(made, rng)

    with pytest.MonkeyPatch.context() as patch:
        # As if forking cost nothing and every launch left the device idle.
        patch.setattr(streams, "FORK_US", -1e9)
        patch.setattr(streams, "WORTH_A_WORKSPACE", 0)
        with checked(patch, start=Walk, plan=plan) as it:
            for _ in range(2):
                program.run(kitsune.accelerate(warmup=0, device="cpu"))
        assert not it.wrong, it.wrong[0]


def test_they_did_fork() -> None:
    assert n_forked > 100, "the test before has compared nothing"


def train(context: Any, n: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    layers = [layer for _ in range(3) for layer in (nn.Linear(256, 256), nn.GELU(), nn.LayerNorm(256), nn.Dropout(0.1))]
    model = nn.Sequential(*layers, nn.Linear(256, 10)).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    x, target, losses = torch.randn(64, 256, device="cuda"), torch.arange(64, device="cuda") % 10, []
    with context:
        for _ in range(n):
            with torch.autocast("cuda", torch.bfloat16):
                loss = F.cross_entropy(model(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    return [*losses, *model.parameters()]


@pytest.mark.gpu
@pytest.mark.parametrize("workspace", [0, streams.WORTH_A_WORKSPACE], ids=["products as well", "no products"])
def test_branches_of_a_graph_compute_what_one_stream_does(workspace: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "WORTH_A_WORKSPACE", workspace)
    monkeypatch.setattr(streams, "FORK_US", -1e9)
    kitsune.reset()
    with kitsune.config.patch(gate=False, compile_workers=0), contextlib.ExitStack() as stack:
        stack.callback(torch.use_deterministic_algorithms, False)
        # New memory is filled then: a fill on one stream came after the result on another one.
        torch.use_deterministic_algorithms(True)
        with kitsune.config.patch(streams=1):
            expected = train(kitsune.accelerate(), 40)
        kitsune.reset()
        before = kitsune.counters()["replayed"]
        got = train(kitsune.accelerate(), 40)
        plan = kitsune.last_plan()
    assert plan is not None and {launch.stream for launch in plan.launches} > {0}
    assert kitsune.counters()["replayed"] - before >= 30
    assert all(map(torch.equal, got, expected))


class Stream:
    """A stream that does nothing."""

    cuda_stream = 0

    def wait_stream(self, other: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self) -> object:
        return object()


def test_memory_is_taken_before_a_library_call_of_the_same_time_can_give_back_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def program() -> list[torch.Tensor]:
        x = torch.ones(64, 64)
        return [x @ x, torch.exp(x) * 2, x.cumsum(0), torch.sin(x) + 1, (x @ x).exp() * 3, x.cumsum(1)]

    monkeypatch.setattr(streams, "FORK_US", -1e9)
    graph, *_ = record(program)
    with kitsune.config.patch(streams=4):
        plan = plan_for(graph, "sm_90")
    prepared = executor()[0].prepare(plan)
    assert {launch.stream for launch in plan.launches} > {0, 1}
    waves = {k: n for n, wave in enumerate(streams.waves(plan.launches, plan.graph)) for k in wave}
    ran: list[Instruction] = []
    for kind in (Allocate, Call, CallInto, Start):
        monkeypatch.setattr(kind, "run", lambda self, frame: ran.append(self))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr("kitsune.runtime.branches.place_of", lambda stream: stream)
    monkeypatch.setattr("kitsune.runtime.branches.enter", lambda stream: None)
    monkeypatch.setattr("kitsune.runtime.branches._sides", lambda device, n: [Stream() for _ in range(n)])
    frame = Frame(prepared.layout, [None] * 100, [], 0)
    instructions = [i for i in prepared.instructions if isinstance(i, (Allocate, Call, CallInto, Start))]
    Branches(plan.launches, torch.device("cuda", 0)).run(instructions, frame)
    assert sorted(map(id, ran)) == sorted(map(id, instructions))
    started: set[int] = set()
    n_after_others = 0
    for instruction in ran:
        if isinstance(instruction, Allocate):
            assert waves[instruction.at] not in started, "a call of its wave may have given back what it is given"
            n_after_others += bool(started)
        elif instruction.at in waves:
            started.add(waves[instruction.at])
    assert n_after_others, "there was one wave only"


def deterministic_tables(context: Any, n: int) -> list[torch.Tensor]:
    """Gradients of tables are sorted and summed up in memory that the calls take for themselves."""
    torch.manual_seed(0)
    tables = nn.ModuleList(nn.Embedding(k, 16) for k in (50, 80, 7)).cuda()
    top = nn.Sequential(nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 1)).cuda()
    optimizer = torch.optim.AdamW([*tables.parameters(), *top.parameters()], lr=1e-2, fused=True)
    ids = torch.randint(0, 7, (n, 256, 3), device="cuda")
    losses = []
    with context:
        for batch in ids:
            optimizer.zero_grad()
            rows = torch.cat([table(batch[:, k]) for k, table in enumerate(tables)], 1)
            chosen = rows[:, torch.arange(47, -1, -1, device="cuda")]
            loss = top(chosen).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    return [*losses, *tables.parameters(), *top.parameters()]


@pytest.mark.gpu
def test_what_library_calls_take_for_themselves_is_nobody_elses() -> None:
    with kitsune.config.patch(gate=False, compile_workers=0), contextlib.ExitStack() as stack:
        stack.callback(torch.use_deterministic_algorithms, False)
        # New memory is filled with NaN: a temporary of one stream that another one computes in shows.
        torch.use_deterministic_algorithms(True)
        expected = deterministic_tables(contextlib.nullcontext(), 60)
        for _ in range(6):
            kitsune.reset()
            got = deterministic_tables(kitsune.accelerate(), 60)
            assert kitsune.counters()["replayed"] >= 40
            assert all(map(torch.equal, got, expected))
    plan = kitsune.last_plan()
    assert plan is not None and {launch.stream for launch in plan.launches} > {0}
