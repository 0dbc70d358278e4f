"""The stages, put together: dispatch -> lazy -> planning -> runtime -> profiler."""

import contextlib
import math
import threading
import time
from collections.abc import Collection
from functools import partial
from typing import Any

import torch

from kitsune.backends import arch_here, half_of_memory
from kitsune.background import n_awaited, soon, thread, wait
from kitsune.checking import checked_run
from kitsune.config import config
from kitsune.dispatch import CallMode, RecordMode, below_autograd, describe, infer, keep_out_of_dynamo
from kitsune.engine_options import DEFAULT, EngineOptions
from kitsune.fusion import ANYTHING, Rules
from kitsune.garbage import LATEST, threshold
from kitsune.gate import Gate, Progress
from kitsune.ir import Barrier, Graph, Handover, Plan, Site, quiet, verify
from kitsune.lazy import (
    REPLACED_BEFORE,
    ByDoors,
    CallLane,
    LazyTensor,
    Recorder,
    close_graph_doors,
    in_a_step,
    memory_changed,
    open_graph_doors,
    record_shielded,
    settle_spent,
    where_in_step,
)
from kitsune.planning import planner_for
from kitsune.profiler import Show, Tally
from kitsune.running import Runner, runners
from kitsune.runtime import Answers, asked_bytes, give_back, has_room, would_rise
from kitsune.standing import Replays, Standing, standing
from kitsune.standing_aside import stand_aside

tally = Tally()
tally.n_compiling = n_awaited
thread.in_a_step, thread.where = in_a_step, where_in_step
# What `last_plan` is asked for: the graph, and the cause of its end; and who hears of each region as it closes.
latest: dict[str, Any] = {}
listeners: list[Any] = []

# For torch's own profiler, and only while it runs: to ask costs 0.1 us, a span 16.
profiled, span, NO_SPAN = torch.autograd._profiler_enabled, torch.autograd.profiler.record_function, contextlib.nullcontext()

for function in (Recorder.record, record_shielded, LazyTensor.__torch_dispatch__.__func__):  # type: ignore[attr-defined]
    keep_out_of_dynamo(function.__code__)


class Listener(RecordMode, Recorder):
    """The dispatch mode and the recorder in one object: calling from one to the other would cost 0.1 us per op."""

    __torch_dispatch__ = Recorder.record

    def __init__(self, **stages: Any) -> None:
        RecordMode.__init__(self)
        Recorder.__init__(self, **stages)


class Follower(CallMode, CallLane):
    """The function mode and the call lane in one object."""

    __torch_function__ = CallLane.call

    def __init__(self, recorder: Recorder) -> None:
        CallMode.__init__(self)
        CallLane.__init__(self, recorder)


class Porter(CallMode, ByDoors):
    """The same of what takes calls where they are not followed."""

    __torch_function__ = ByDoors.call


class Pipeline:
    """One per accelerating thread: a listener that intercepts and records, and an executor that runs what is flushed."""

    def __init__(self, device: torch.device, warmup: int, options: EngineOptions = DEFAULT) -> None:
        self.device, self.runner = device, Runner(device, tally, options)
        self.replays = Replays(self.runner)
        self.recorder = Listener(
            device=device,
            warmup=warmup,
            max_ops=config.max_pending_ops,
            max_bytes=config.max_pending_bytes or half_of_memory(device),
            describe=describe,
            infer=infer,
            below_autograd=below_autograd,
            run=self.run,
            tally=tally,
            on_close=self.closed,
            on_growth=threshold.grows,
            on_plans=self.runner.thread_plans.seen,
        )
        self.recorder.lane = self.lane = Follower(self.recorder)
        self.recorder.stand_aside = partial(stand_aside, self.runner.steady)
        self.recorder.let_go, self.recorder.begins = self.runner.let_go, self.runner.begins
        write = partial(self.lane.write_ahead, thread.breathe)
        self.lane.ask_to_write = partial(soon, write, True) if self.runner.in_background() else None
        self.porter = Porter()
        # Does it take this thread's ops now? Not while the steps of an open context are left to eager. Or is it ending that? Or
        # could the mode not be taken off the stack when its context closed? See RecordMode.leave and `_turn_off`.
        self.follows = self.on = self.closing = self.left_behind = False
        # A static function is being learned: its steps are recorded, whatever the gate says of those that Python goes through.
        self.insists = False
        # Regions ended while the collector owes a look at what is new, captures when the last one did; times all was forgotten.
        self.n_closed = self.n_captured = self.n_forgotten = 0
        memory = partial(has_room, device), partial(asked_bytes, device), self.make_way, partial(give_back, device)
        self.gate = Gate(device.type == "cuda", self.progress, self.seconds, *memory, quiet, tally)

    def enter(self) -> None:
        """Take the calls and ops of this thread from here on."""
        self.recorder.enter()
        # Also after an interrupt at the end of one.
        self.lane.inside = 0
        self.recorder.early.on = config.early_reads
        self.follow()

    def follow(self) -> None:
        """Take calls, not ops alone."""
        if self.follows:
            return
        if config.follow and REPLACED_BEFORE:
            replaced = " and ".join(REPLACED_BEFORE[:4])
            tally.notes[f"Calls are not followed: {replaced} had been replaced before Kitsune was imported."] = None
        # Before it does: what has come to be done by an interrupt, `stop_following` undoes.
        self.follows = config.follow and not REPLACED_BEFORE
        if self.follows and not self.lane.enter():
            self.follows = False
        if self.follows:
            self.recorder.known.come_back()
            self.recorder.hook = self.lane.stray
            open_graph_doors(self.lane)
        elif not config.follow:
            self.porter.enter()

    def stop_following(self, for_good: bool = False) -> None:
        """Take ops alone: another pipeline has been opened inside, or none is open any more."""
        self.porter.leave()
        if self.follows:
            settle_spent(self.lane)
            self.recorder.known.leave()
            self.lane.leave()
            close_graph_doors(self.lane, for_good)
            self.recorder.hook, self.follows = None, False

    def leave(self, for_good: bool = False) -> bool:
        """The opposite of `enter`; False if that is not possible now."""
        if threshold.owes_look:
            threshold.look()
        self.stop_following(for_good)
        return self.recorder.leave()

    def run(self, graph: Graph, values: list[Any], scalars: list[float], handover: Handover | None = None) -> Answers | None:
        """Run a flushed region: `values` has the inputs by number and receives the outputs, of which the answers know something
        before they are there. With a `handover` it is a part of a region that has two."""
        if handover is None or config.check or not (pairs := self.runner.pairs).are_made:
            return self.run_graph(graph, values, scalars)
        with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
            instead = pairs.begin(graph, values, handover)
        answers = self.run_graph(instead, values, scalars)
        with below_autograd(), torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
            pairs.end(graph, instead, values, scalars, handover)
        return answers

    def run_graph(self, graph: Graph, values: list[Any], scalars: list[float]) -> Answers | None:
        """The same for one graph."""
        with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
            region = None if profiled() else self.replays.replay(graph, values, scalars)
        if region is not None:
            return region.answers(values)
        # A region that ends outside of a call of the API would have its own ops looked at as calls.
        seen = span(f"kitsune::run[{len(graph.ops)} operators]") if profiled() else NO_SPAN
        with below_autograd(), torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction(), seen:
            if config.check:
                checked_run(self.runner, self.device, graph, values, scalars)
                return None
            answers = self.runner.run(graph, values, scalars)
            self.replays.learn(graph)
            return answers

    def standing(self, graph: Graph, values: list[Any], sure: Collection[int]) -> Standing | None:
        """A region that will be replayed as it was, to be passed to `again`; None where that cannot be said."""
        # What is checked is run at length.
        return None if config.check else standing(self.runner, graph, values, sure)

    def again(self, region: Standing, values: list[Any], scalars: tuple[float, ...]) -> bool:
        """The same as `run` with less to look at, where no mode of torch and no profiler is on. False: `run` it."""
        memory_changed()
        return region.replay(values, scalars)

    def closed(self, graph: Graph, cause: Barrier, site: Site | None, observed: bool) -> None:
        """A region ended. One that was observed is made ready for its first run, and for the thread that will run it: its
        backward has run in autograd's, the next time it is this one."""
        self.lane.unused.give_back()
        close(graph, cause, site, self.runner.options)
        if observed:
            with below_autograd(), torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
                self.runner.expect(graph)
        self.lane.write_matchers()
        self._look_at_new()

    def _look_at_new(self) -> None:
        """Behind a capture, or after some regions, have the collector look at what was learned."""
        self.n_closed += threshold.owes_look
        if threshold.owes_look and (tally.n_captured > self.n_captured or self.n_closed > LATEST):
            threshold.look()
            self.n_closed = 0
        self.n_captured = tally.n_captured

    def forget(self) -> None:
        """Drop every region seen so far, and its plan."""
        self.recorder.flush(Barrier.FLUSH)
        self.recorder.forget()
        self.lane.forget()
        self.n_forgotten += 1
        latest.clear()
        self.runner.forget()
        self.replays.forget()
        self.gate.restart()

    def progress(self) -> Progress:
        """What the gate looks at after a recorded step."""
        n_ops = tally.recorded + tally.observed
        return Progress(n_ops, self.recorder.n_nodes, tally.n_captured + len(tally.plans), tally.unfused)

    def seconds(self) -> float:
        """The time at which all that was asked of the device so far is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def make_way(self) -> None:
        """Let eager steps have the memory of graphs, where both together would need more than there ever was."""
        steady, pool = self.runner.steady, self.runner.pool
        if would_rise(self.device, 0 if pool is None else pool.statistics.held_bytes):
            self.replays.forget()
            if pool is not None:
                pool.give_way()
            if steady is not None:
                steady.forget()
            give_back(self.device)


def close(graph: Graph, cause: Barrier, site: Site | None, options: EngineOptions) -> None:
    """A region ended: check it, show it, tell who listens."""
    if cause is Barrier.STEP or latest.get("cause") is not Barrier.STEP:
        latest.update(graph=graph, cause=cause, numerics=options.grade, options=options)
    if config.verify:
        verify(graph)
    if config.debug:
        Show(config.debug).flush(len(graph.ops), cause, site)
    for listener in listeners:
        listener(graph)


def last_plan(arch: str | None = None) -> Plan | None:
    """The plan of the last region that an optimizer's step() ended or, where none has, of the last region; None before any.

    `arch` is the GPU to plan for, sm_80 or sm_90: by default the one that is here and, where there is none, sm_90. The plan
    prints as a table. Of a region that ran without fusion it is the plan that fusion would have made. Raises ValueError for an
    architecture that Kitsune cannot plan for.
    """
    options = latest.get("options", DEFAULT)
    planner = planner_for(arch or arch_here(), options.rules, latest.get("numerics"), options.n_streams)
    return None if (graph := latest.get("graph")) is None else planner.plan(graph)


def planned_for(graph: Graph, arch: str | None = None, rules: Rules = ANYTHING, n_streams: int | None = None) -> Plan:
    """The plan of a region, under a context's rules."""
    return planner_for(arch or arch_here(), rules, n_streams=n_streams).plan(graph)


def wait_for_kernels(timeout: float | None = None, tuned: bool = False) -> bool:
    """Wait until what is planned and compiled in the background is there; False if `timeout` seconds are not enough.

    The next run of each region known by now is by its plan then. With `tuned`, the tiles of kernels that this thread replays
    are timed as well, which otherwise happens beside its steps. A program needs it for measurements only.
    """
    until = math.inf if timeout is None else time.perf_counter() + timeout
    for runner in list(runners):
        runner.ask_all()
    there = wait(timeout)
    with below_autograd(), torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
        for runner in list(runners):
            runner.spread_nothing()
            if tuned and there and runner.thread == threading.get_ident():
                runner.tune_all(until)
    if not tuned or not there:
        return there
    return time.perf_counter() < until and wait(None if timeout is None else max(until - time.perf_counter(), 0.0))
