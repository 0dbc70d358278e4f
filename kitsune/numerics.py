"""What `kitsune.explain(numerics=True)` tells: the ops whose bits may differ from eager's, and which the last plan has."""

from collections import Counter

import torch

from kitsune.codegen import UNROUNDED, Difference, base_name, differences, toolkit_libdevice
from kitsune.config import config
from kitsune.ir import Graph, Op, Plan
from kitsune.pipeline import last_plan, latest
from kitsune.profiler import Numerics, NumericsLine
from kitsune.scheduler import common_subexpressions, dead_code


def numerics_now() -> Numerics:
    """For the last region and the grade that it ran in; before any, for the knob's."""
    grade = latest.get("numerics") or config.numerics
    toolkit = not torch.cuda.is_available() or toolkit_libdevice() is not None
    plan, graph = last_plan(), latest.get("graph")
    otherwise = made_otherwise(graph, plan) if plan is not None and graph is not None else Counter()
    lines = [_line(one, otherwise) for one in differences(grade, toolkit)]
    return Numerics(grade, tuple(sorted(lines, key=lambda line: -line.in_last_plan)))


def _line(one: Difference, otherwise: Counter[str]) -> NumericsLine:
    return NumericsLine(one.op, one.reason, one.measured, otherwise[one.op])


def made_otherwise(graph: Graph, plan: Plan) -> Counter[str]:
    """By name, the recorded ops that a plan does not call as they were recorded: they are in kernels, taken apart, or called
    with operands of another size or layout. And how many kernels leave results unrounded."""
    # What nobody needs, or is there twice, is not made otherwise.
    recorded = Counter(map(_call, common_subexpressions(dead_code(graph)).ops))
    called = Counter(_call(launch.op) for launch in plan.launches if launch.op is not None)
    found: Counter[str] = Counter()
    for (name, *_), n in (recorded - called).items():
        found[name] += n
    kernels = [kernel for launch in plan.launches for kernel in launch.kernels]
    found[UNROUNDED] = sum(not kernel.rounds for kernel in kernels)
    return found


def _call(op: Op) -> tuple[str, ...]:
    types = (f"{v.type.dtype} {tuple(v.type.shape)} {v.type.stride}" for v in op.inputs)
    return base_name(op), str(op.target), *types
