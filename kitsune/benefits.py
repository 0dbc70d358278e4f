"""How many times as fast as its operators a kernel is: measured once per shape, where `min_fusion_benefit` asks for it."""

from collections.abc import Callable, Hashable
from dataclasses import replace

import torch

from kitsune.fusion import MEASURED, benefit_key
from kitsune.ir import Graph, Kernel, Kind, Op, Plan, TensorType, Value, slots_in
from kitsune.planning import Planner
from kitsune.runtime import PlanExecutor, device_seconds, prepare, replay

Seconds = Callable[[Callable[[], None], torch.device], float]


def gains_enough(plan: Plan, planner: Planner, executor: PlanExecutor) -> bool:
    """False if a kernel of the plan was found to gain too little: planned again, it is left out."""
    least = planner.rules.min_benefit
    if not least:
        return True
    try:
        found = measure(plan, planner, executor)
    except torch.OutOfMemoryError:
        return True
    MEASURED.update(found)
    return all(benefit >= least for benefit in found.values())


def measure(plan: Plan, planner: Planner, executor: PlanExecutor, seconds: Seconds = device_seconds) -> dict[Hashable, float]:
    """The benefit of each kernel of a plan that is launched alone and was not measured yet.

    Kernels that are started together save launches, which is not seen by one of them: they are left out.
    """
    found: dict[Hashable, float] = {}
    for launch in plan.launches:
        if len(launch.kernels) == 1 and len(launch.kernels[0].steps) > 1:
            kernel = launch.kernels[0]
            if any(step.op.effects.random for step in kernel.steps):
                continue
            key = benefit_key(kernel)
            if key not in found and key not in MEASURED:
                benefit = _benefit(plan.graph, kernel, planner, executor, seconds)
                if benefit is not None:
                    found[key] = benefit
    return found


def _benefit(graph: Graph, kernel: Kernel, planner: Planner, executor: PlanExecutor, seconds: Seconds) -> float | None:
    part = part_of(graph, kernel)
    # Its layouts are decided.
    plan = replace(planner, layouts=False).plan(part)
    if plan.n_launches != 1 or not any(launch.kernels for launch in plan.launches):
        # By itself it would be something else.
        return None
    fused, schedule = executor.prepare(plan), prepare(part)
    scalars = [1.0] * (1 + max((slot.index for op in part.ops for slot in slots_in((op.args, op.kwargs))), default=-1))
    inputs = {value.id: example(value.type) for value in part.inputs}
    n_values = 1 + max(value.id for op in part.ops for value in (*op.inputs, *op.outputs))

    def values() -> list[torch.Tensor | None]:
        return [inputs.get(number) for number in range(n_values)]

    device = kernel.stores[0].access.value.type.device
    together = seconds(lambda: executor.run(fused, values(), scalars), device)
    apart = seconds(lambda: replay(schedule, values(), scalars), device)
    return apart / together if together else None


def part_of(graph: Graph, kernel: Kernel) -> Graph:
    """The ops of one kernel, with the views between them, as a graph of its own."""
    members = {id(step.op) for step in kernel.steps}
    ops: list[Op] = []
    inputs: dict[int, Value] = {}
    made: set[int] = set()
    for op in graph.ops:
        between = op.kind is Kind.VIEW and all(value.id in made for value in op.inputs)
        if id(op) not in members and not between:
            continue
        inputs.update((value.id, value) for value in op.inputs if value.id not in made)
        made.update(value.id for value in op.outputs)
        ops.append(op)
    needed = {store.access.value.id for store in kernel.stores}
    outputs = tuple(value for op in ops for value in op.outputs if value.id in needed)
    return Graph(tuple(inputs.values()), tuple(ops), outputs)


def example(type_: TensorType) -> torch.Tensor:
    """A tensor of a type, with memory of its own: zeros where they count or point."""
    reach = 1 + sum((n - 1) * stride for n, stride in zip(type_.shape, type_.stride, strict=True) if n)
    memory = torch.zeros(type_.offset + max(reach, 1), dtype=type_.dtype, device=type_.device)
    if type_.dtype.is_floating_point:
        # No random numbers: the program's generator must stay as it is.
        memory.fill_(0.5)
    return memory.as_strided(type_.shape, type_.stride, type_.offset)
