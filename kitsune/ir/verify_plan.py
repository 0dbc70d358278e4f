"""What every Plan must satisfy: each op once, in an order that the graph allows, and no two living storages on one byte."""

from collections.abc import Sequence

from kitsune.ir.edges import bits, predecessors
from kitsune.ir.graph import Kind
from kitsune.ir.plan import Launch, Plan


def verify_plan(plan: Plan, before: Sequence[int], sizes: dict[int, int]) -> None:
    """Raise ValueError where a plan is unsound.

    `before[k]` has the launches that have ended when launch k starts, as bits; `sizes` the bytes of each storage in the arena.
    """
    launched = _launched_once(plan)
    needs = predecessors(plan.graph)
    for number, k in launched.items():
        for other in bits(needs[number]):
            if launched[other] != k and not before[k] >> launched[other] & 1:
                raise ValueError(f"launch {k} ({plan.launches[k].name}) may start before {plan.graph.ops[other].target} has run")
    _check_arena(plan, before, sizes)


def _launched_once(plan: Plan) -> dict[int, int]:
    """The launch of each op, by number in the graph."""
    numbers = {id(op): number for number, op in enumerate(plan.graph.ops)}
    launched: dict[int, int] = {}
    for k, launch in enumerate(plan.launches):
        order = [numbers[id(op)] for op in launch.ops]
        if launch.kernels and any([*k_order] != sorted(k_order) for k_order in _per_kernel(launch, numbers)):
            raise ValueError(f"launch {k} ({launch.name}) computes its operators out of order")
        for number in order:
            if launched.setdefault(number, k) != k or order.count(number) > 1:
                raise ValueError(f"{plan.graph.ops[number].target} is launched twice")
    for number, op in enumerate(plan.graph.ops):
        if number not in launched and op.kind is not Kind.VIEW:
            raise ValueError(f"{op.target} is never launched")
    return {number: k for number, k in launched.items() if plan.graph.ops[number].kind is not Kind.VIEW}


def _per_kernel(launch: Launch, numbers: dict[int, int]) -> list[list[int]]:
    return [[numbers[id(step.op)] for step in kernel.steps] for kernel in launch.kernels]


def _check_arena(plan: Plan, before: Sequence[int], sizes: dict[int, int]) -> None:
    first: dict[int, int] = {}
    uses: dict[int, int] = {}
    for k, launch in enumerate(plan.launches):
        for storage in storages_of(launch):
            if storage in plan.offsets:
                if not launch.host_only:
                    first.setdefault(storage, k)
                uses[storage] = uses.get(storage, 0) | 1 << k
    placed = sorted((plan.offsets[s], plan.offsets[s] + sizes[s], s) for s in first)
    for i, (start, end, a) in enumerate(placed):
        if start < 0 or end > plan.arena:
            raise ValueError(f"storage {a} lies outside of the arena")
        for low, _, b in placed[i + 1 :]:
            if low >= end:
                break
            if uses[a] & ~before[first[b]] and uses[b] & ~before[first[a]]:
                raise ValueError(f"storages {a} and {b} share bytes while both are in use")


def storages_of(launch: Launch) -> set[int]:
    """The storages that a launch reads or writes."""
    if launch.op is not None:
        return {v.storage for v in (*launch.op.inputs, *launch.op.outputs)}
    accesses = [access for kernel in launch.kernels for access in (*kernel.loads, *(s.access for s in kernel.stores))]
    return {access.value.storage for access in accesses}
