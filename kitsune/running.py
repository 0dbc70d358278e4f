"""How regions are run on a device: by plan with kernels where there is a GPU and Triton, op by op elsewhere."""

import importlib.util
import itertools
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kitsune.codegen import Compiler, render
from kitsune.config import KitsuneWarning, config
from kitsune.ir import Graph, Launch, Plan, Program, reads_slots
from kitsune.memory import MemoryPool
from kitsune.planning import planner_for, slot_planner_for
from kitsune.profiler import PlanTally, Show, Tally, plan_tally
from kitsune.runtime import (
    Arenas,
    CudaGraphs,
    GraphRecorder,
    PlanExecutor,
    Prepared,
    Schedule,
    SlotTable,
    Steady,
    SteadyState,
    Work,
    current_stream,
    numeric_settings,
    plan_work,
    prepare,
    replay,
    schedule_work,
)
from kitsune.runtime.kernel_launch import PreparedLaunch
from kitsune.scheduler import RATES, dead_code, run_passes

# Regions that are kept ready to run; a program that never repeats has no end of them.
MAX_READY = 1024
# The plan that is shown where none is run: of the newest device whose rates are known.
SHOWN_ARCH = "sm_90"
# Of regions as they are shown; the runners of several threads may write into one folder.
_numbers = itertools.count()


@dataclass(slots=True)
class Ready:
    """A region, ready to run: by plan, or op by op. `graph` has what is run of it."""

    work: Prepared | Schedule
    plan: PlanTally | None
    n_ops: int
    n_dead: int
    graph: Graph
    steady: Steady | None = None


@dataclass(frozen=True, slots=True)
class Backend:
    """What can run plans: the architecture that they are made for, and what makes a launch of kernels ready to start.

    `prepare_in_graph` does so for a capture, given what it made for ordinary runs and the table with the moving numbers.
    """

    arch: str
    prepare_launch: Callable[[Launch], Any]
    prepare_in_graph: Callable[[Launch, Any, SlotTable], Any] | None = None


class Runner:
    """Runs the regions of one thread on one device: by plan where there is a backend, op by op elsewhere."""

    def __init__(self, device: torch.device, tally: Tally) -> None:
        self.tally = tally
        self.ready: dict[Any, Ready] = {}
        # What went wrong and was mended in the run that is going on; said when it has ended.
        self.sentences: list[str] = []
        self.executor: PlanExecutor | None = None
        self.steady: SteadyState | None = None
        backend = self.backend = backend_of(device)
        recorder = recorder_of(device)
        # A quarter of the device's memory.
        self._budget = _pool_budget(device) if recorder is not None or isinstance(backend, Backend) else 0
        if recorder is not None:
            self.steady = SteadyState(device, recorder, self._limits, self._relieve, self.sentences.append, tally)
        if isinstance(backend, Backend):
            self.arch = backend.arch
            self.executor = PlanExecutor(backend.prepare_launch, MemoryPool(self._budget), self.sentences.append)
            self.arenas = Arenas(self.executor.pool)
        elif device.type == "cuda":
            self.sentences.append(backend)

    def run(self, graph: Graph, values: list[Any], scalars: list[float]) -> None:
        """Run a closed region: `values` has the inputs by number and receives the outputs."""
        key = (graph, config.fuse, config.fuel, numeric_settings() if self.steady is not None else None)
        ready = self.ready.get(key)
        if ready is None:
            if len(self.ready) >= MAX_READY:
                self.forget()
            ready = self.ready[key] = self._prepare(graph)
        self.tally.ran(ready.n_ops, ready.n_dead, ready.plan)
        try:
            if self._replayed(ready, values, scalars):
                pass
            elif isinstance(ready.work, Schedule):
                replay(ready.work, values, scalars)
            else:
                assert self.executor is not None
                self.executor.run(ready.work, values, scalars)
        except BaseException as error:
            self._say(error)
            raise
        finally:
            if self.executor is not None and not config.pool:
                self.executor.pool.free_all()
        self._say()

    def forget(self) -> None:
        """Drop every plan and every graph, and the memory kept for them."""
        if self.steady is not None:
            self.steady.forget()
        self.ready.clear()
        if self.executor is not None:
            self.executor.pool.free_all()

    def _prepare(self, graph: Graph) -> Ready:
        if config.fuse:
            try:
                if self.executor is not None:
                    return self._planned(graph)
                if _show().wanted:
                    show_plan(graph, SHOWN_ARCH)
            except Exception as error:
                if config.verify:
                    raise
                self.sentences.append(
                    f"A region of {len(graph.ops)} operators could not be planned and is run op by op ({type(error).__name__}: "
                    f"{error}). This is a bug in Kitsune: please report it."
                )
        alive = run_passes(graph, (dead_code,), config.verify)
        return Ready(prepare(alive), None, len(alive.ops), len(graph.ops) - len(alive.ops), alive)

    def _planned(self, graph: Graph) -> Ready:
        assert self.executor is not None
        plan = show_plan(graph, self.arch)
        n_ops = sum(len(launch.ops) for launch in plan.launches)
        n_dead = len(graph.ops) - len(dead_code(graph).ops)
        return Ready(self.executor.prepare(plan), plan_tally(plan), n_ops, n_dead, plan.graph)

    def _replayed(self, ready: Ready, values: list[Any], scalars: list[float]) -> bool:
        """Was the region run as a CUDA graph?"""
        if self.steady is None or not config.graphs:
            return False
        if ready.steady is None:
            ready.steady = self.steady.region(ready.graph, lambda table: self._work(ready, table))
        n_captured = self.tally.n_captured
        done = self.steady.run(ready.steady, values, scalars)
        if config.debug and self.tally.n_captured > n_captured and ready.steady.captured is not None:
            _show().captured(ready.n_ops, ready.steady.captured.nbytes)
        return done

    def _work(self, ready: Ready, table: SlotTable) -> Work:
        """What is captured of a region. Only kernels can read moving numbers from memory."""
        backend, prepared = self.backend, ready.work
        if isinstance(prepared, Schedule):
            plans = isinstance(backend, Backend) and any(map(reads_slots, ready.graph.ops))
            if not plans:
                return schedule_work(prepared, table)
            assert self.executor is not None
            prepared = self.executor.prepare(slot_planner_for(self.arch).plan(ready.graph))
        assert isinstance(backend, Backend) and self.executor is not None
        in_graph = backend.prepare_in_graph or (lambda launch, usable, table: usable)
        return plan_work(self.executor, prepared, in_graph, table, self.arenas, current_stream(prepared.device))

    def _limits(self) -> tuple[int, int]:
        return config.max_graphs, config.graph_memory or 2 * self._budget

    def _relieve(self, hard: bool) -> None:
        if self.executor is not None:
            self.executor.pool.free_all()
        if hard and torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def _say(self, error: BaseException | None = None) -> None:
        """Warn of what was mended. Where warnings are errors, none takes the place of the `error` that ended the run."""
        while self.sentences:
            sentence = self.sentences.pop(0)
            self.tally.mended.append(sentence)
            try:
                warnings.warn(sentence, KitsuneWarning, stacklevel=2)
            except KitsuneWarning:
                if error is None:
                    raise


def _show() -> Show:
    return Show(config.debug, Path(config.dump) if config.dump else None)


def show_plan(graph: Graph, arch: str) -> Plan:
    """The plan of a graph, printed and dumped as KITSUNE_DEBUG and KITSUNE_DUMP ask."""
    show = _show()
    if not show.wanted:
        return planner_for(arch).plan(graph)
    show = show.region(graph, next(_numbers))
    start = time.perf_counter()
    plan = planner_for(arch).plan(graph, show.passed)
    show.plan(plan, time.perf_counter() - start)
    show.programs(program_of(launch) for launch in plan.launches if launch.kernels)
    return plan


def backend_of(device: torch.device) -> Backend | str:
    """What runs plans on a device, or why regions run op by op there."""
    if device.type != "cuda":
        return f"There are no kernels for {device.type}: regions run op by op."
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed, so regions run op by op; `pip install kitsune-torch[triton]` brings it."
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {major}.{minor} and kernels need 8.0 or later, so regions run op by op."
    compiler = Compiler(cache_folder())

    def in_graph(launch: Launch, usable: PreparedLaunch, table: SlotTable) -> PreparedLaunch:
        if len(launch.kernels) == 1 and not any(map(reads_slots, launch.ops)):
            return usable
        made = PreparedLaunch(launch, program_of(launch, slots_in_memory=True), compiler, device, table.address)
        made.load(like=usable)
        return made

    return Backend(
        nearest_arch(major, minor),
        lambda launch: PreparedLaunch(launch, program_of(launch), compiler, device),
        in_graph,
    )


def recorder_of(device: torch.device) -> GraphRecorder | None:
    """What captures regions of a device; None where nothing can."""
    return CudaGraphs(device) if device.type == "cuda" else None


def program_of(launch: Launch, slots_in_memory: bool = False) -> Program:
    """The program of a launch of kernels."""
    return render(launch.kernels[0], len(launch.kernels) > 1, slots_in_memory)


def nearest_arch(major: int, minor: int) -> str:
    """Rates are known for some devices only; another one is planned for as its nearest older relative."""
    known = [arch for arch in RATES if int(arch.removeprefix("sm_")) <= major * 10 + minor]
    return known[-1] if known else next(iter(RATES))


def _pool_budget(device: torch.device) -> int:
    # Arenas that are not in use: enough for the regions of a large step, and little beside what the step itself takes.
    if device.type != "cuda":
        return 1 << 30
    return int(torch.cuda.get_device_properties(device).total_memory) // 4


def cache_folder() -> Path:
    """Where kernels are kept."""
    if config.cache_dir is not None:
        return Path(config.cache_dir)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kitsune"
