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
from kitsune.ir import Graph, Launch, Plan, Program
from kitsune.memory import MemoryPool
from kitsune.planning import planner_for
from kitsune.profiler import PlanTally, Show, Tally, plan_tally
from kitsune.runtime import PlanExecutor, Prepared, Schedule, prepare, replay
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
    """A region, ready to run: by plan, or op by op."""

    work: Prepared | Schedule
    plan: PlanTally | None
    n_ops: int
    n_dead: int


@dataclass(frozen=True, slots=True)
class Backend:
    """What can run plans: the architecture that they are made for, and what makes a launch of kernels ready to start."""

    arch: str
    prepare_launch: Callable[[Launch], Any]


class Runner:
    """Runs the regions of one thread on one device: by plan where there is a backend, op by op elsewhere."""

    def __init__(self, device: torch.device, tally: Tally) -> None:
        self.tally = tally
        self.ready: dict[Any, Ready] = {}
        # What went wrong and was mended in the run that is going on; said when it has ended.
        self.sentences: list[str] = []
        self.executor: PlanExecutor | None = None
        backend = backend_of(device)
        if isinstance(backend, Backend):
            self.arch = backend.arch
            self.executor = PlanExecutor(backend.prepare_launch, MemoryPool(_pool_budget(device)), self.sentences.append)
        elif device.type == "cuda":
            self.sentences.append(backend)

    def run(self, graph: Graph, values: list[Any], scalars: list[float]) -> None:
        """Run a closed region: `values` has the inputs by number and receives the outputs."""
        key = (graph, config.fuse, config.fuel)
        ready = self.ready.get(key)
        if ready is None:
            if len(self.ready) >= MAX_READY:
                self.ready.clear()
            ready = self.ready[key] = self._prepare(graph)
        self.tally.ran(ready.n_ops, ready.n_dead, ready.plan)
        try:
            if isinstance(ready.work, Schedule):
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
        """Drop every plan, and the memory kept for them."""
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
        return Ready(prepare(alive), None, len(alive.ops), len(graph.ops) - len(alive.ops))

    def _planned(self, graph: Graph) -> Ready:
        assert self.executor is not None
        plan = show_plan(graph, self.arch)
        n_ops = sum(len(launch.ops) for launch in plan.launches)
        return Ready(self.executor.prepare(plan), plan_tally(plan), n_ops, len(graph.ops) - len(dead_code(graph).ops))

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
    return Backend(nearest_arch(major, minor), lambda launch: PreparedLaunch(launch, program_of(launch), compiler, device))


def program_of(launch: Launch) -> Program:
    """The program of a launch of kernels."""
    return render(launch.kernels[0], batched=len(launch.kernels) > 1)


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
