"""The knob `check`: each region is run as ever, and then once more by eager's operators, one by one, and the two are compared."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from kitsune.backends import Backend, cache_folder
from kitsune.checking.eager_run import EagerRun
from kitsune.checking.findings import CheckReport, Difference, described, kernel_of
from kitsune.checking.inputs import Draws, Start
from kitsune.checking.judge import judge
from kitsune.checking.narrow import first_of, part_of, shows_it
from kitsune.checking.plan_run import op_by_op
from kitsune.checking.reproduction import how_now, no_kernels, write
from kitsune.checking.search import Fault, Ran
from kitsune.config import KitsuneWarning, config
from kitsune.ir import Graph
from kitsune.ready import Ready
from kitsune.running import Runner
from kitsune.shown import SHOWN_ARCH

# Hear of every check; while there are any, nothing is warned of.
reports: list[CheckReport] = []
# Regions in which something was found, which is said once. They are kept, so that no other gets the id of one.
_known: dict[int, Graph] = {}
MAX_KNOWN = 1024
AS_GRAPH = "as a CUDA graph"


@contextlib.contextmanager
def reporting(report: CheckReport) -> Iterator[None]:
    """Let a report hear of every check, from the beginning."""
    _known.clear()
    reports.append(report)
    try:
        yield
    finally:
        reports.remove(report)


def checked_run(runner: Runner, device: torch.device, graph: Graph, values: list[Any], scalars: list[float]) -> None:
    """Run a closed region, and compare. Raises what its operators raise."""
    start, draws = Start(graph, values), Draws(device)
    before, n_replayed = draws.now(), runner.tally.n_replayed
    try:
        with _poisoned(runner):
            runner.run(graph, values, scalars)
    except Exception as error:
        with contextlib.suppress(KitsuneWarning):
            # Where warnings are errors, none takes the place of the program's own.
            _tell(runner, _raised(graph, start, scalars, before, device, error))
        raise
    ready, after = runner.ready[runner.key(graph)], draws.now()
    try:
        replayed = runner.tally.n_replayed > n_replayed
        _check(
            runner, ready, replayed, Ran(graph, start, values, scalars, before, after, device, *_run_of(runner, ready, replayed))
        )
    finally:
        draws.set(after)


@contextlib.contextmanager
def _poisoned(runner: Runner) -> Iterator[None]:
    """New memory has no values in it, such as the right ones of an earlier run."""
    if runner.executor is None:
        yield
        return
    runner.executor.poisons = True
    try:
        yield
    finally:
        runner.executor.poisons = False


def _run_of(runner: Runner, ready: Ready, replayed: bool) -> tuple[Any, ...]:
    """What was run: the plan, its kernels, its grade of numerics, and in which words."""
    plan = op_by_op(ready.graph) if ready.plan is None else ready.plan.plan
    if replayed and ready.in_graph is not None:
        plan = ready.in_graph.plan
    prepare = runner.backend.prepare_launch if isinstance(runner.backend, Backend) else no_kernels
    how = AS_GRAPH if replayed else "as a whole"
    return plan, prepare, runner.options.grade, how


def _check(runner: Runner, ready: Ready, replayed: bool, ran: Ran) -> None:
    runner.tally.checked += 1
    if id(ran.graph) in _known:
        return
    try:
        # What is not there yet is compiled here: a kernel that is pending would be run by its operators, and prove nothing.
        with config.patch(compile_workers=0):
            verdict = judge(ran)
            difference = None if verdict.fault is None else _described(runner, ready, ran, verdict.fault)
    except torch.OutOfMemoryError:
        _note(runner, f"There was no memory to check a region of {len(ran.graph.ops)} operators beside eager.")
        return
    except Exception as error:
        if config.verify:
            raise
        what = f"A region of {len(ran.graph.ops)} operators could not be checked ({type(error).__name__}: {error})."
        _note(runner, f"{what} This is a bug in Kitsune: please report it.")
        return
    for report in reports:
        report.regions += 1
        report.values += verdict.n_compared
        report.rounded += not verdict.same and difference is None
        report.kernels += sum(bool(launch.kernels) for launch in ran.plan.launches)
        report.replays += replayed
        report.numerics = runner.options.grade
    if difference is not None:
        if len(_known) >= MAX_KNOWN:
            _known.clear()
        _known[id(ran.graph)] = ran.graph
        _tell(runner, difference)


def _raised(
    graph: Graph, start: Start, scalars: list[float], before: torch.Tensor, device: torch.device, error: Exception
) -> Difference | None:
    """A run has raised: does eager?"""
    if isinstance(error, torch.OutOfMemoryError):
        return None
    eager = EagerRun(graph, start.values(), scalars, device)
    eager.state = before
    try:
        eager.run()
    except Exception as other:
        if type(other) is type(error) or isinstance(other, torch.OutOfMemoryError):
            return None
        return Difference(*described(None), f"it raises {type(error).__name__} where eager raises {type(other).__name__}")
    return Difference(*described(None), f"it raises {type(error).__name__} ({error}) where eager raises nothing")


def _described(runner: Runner, ready: Ready, ran: Ran, fault: Fault) -> Difference:
    graph, inputs = ran.graph, {n: t for n, t in enumerate(ran.start.values()) if t is not None}
    first = fault
    if fault.origin is not None and fault.launch is not None and fault.launch.kernels and isinstance(runner.backend, Backend):
        plan, prepare = runner.planner().plan, runner.backend.prepare_launch
        part = part_of(fault.origin, ran.scalars)
        if part is not None and shows_it(part, fault.origin, plan, prepare, ran.scalars, ran.numerics):
            graph, inputs = part.graph, part.inputs
        first = first_of(ran, fault, plan)
    difference = Difference(*described(first.op), first.sentence, *kernel_of(fault.launch))
    arch = runner.arch if isinstance(runner.backend, Backend) else SHOWN_ARCH
    how = how_now(arch, runner.options.grade, ready.plan is not None)
    try:
        path = write(cache_folder() / "differences", graph, inputs, ran.scalars, ran.before, how, str(difference))
    except (OSError, RuntimeError) as error:
        return replace(difference, problem=f"The region could not be written to {cache_folder()} ({error}).")
    # Of a fault of streams or of graphs it may show nothing.
    once = "The file launches the plan once, in the ordinary way." if ran.how == AS_GRAPH else ""
    return replace(difference, reproduction=str(path), problem=once)


def _tell(runner: Runner, difference: Difference | None) -> None:
    if difference is None:
        return
    runner.tally.different += 1
    for report in reports:
        report.differences.append(difference)
    if not reports:
        _warn(runner, str(difference))


def _note(runner: Runner, problem: str) -> None:
    """A run was not checked."""
    for report in reports:
        report.problems.append(problem)
    if not reports:
        _warn(runner, problem)


def _warn(runner: Runner, sentence: str) -> None:
    runner.tally.notes[sentence] = None
    warnings.warn(sentence, KitsuneWarning, stacklevel=2)
