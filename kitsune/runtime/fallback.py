"""A launch whose kernel cannot be used: its ops through aten, on tensors over the memory that the kernel would have used."""

from collections.abc import Callable

import torch

from kitsune.ir import Launch, Op, Step, Value, may_have_drawn
from kitsune.runtime.calls import call
from kitsune.runtime.frame import Frame
from kitsune.runtime.places import Places


def run_by_ops(launch: Launch, places: Places, frame: Frame, relieve: Callable[[], None]) -> None:
    """Run the ops of a kernel one by one. `relieve` frees memory that nobody uses, after which an op is tried once more.

    New results are copied into their places at the end only: a kernel reads everything before it writes anything, so that the
    memory planner may have put a result where an operand is that dies in the same kernel.
    """
    frame.partial = any(op.rewritten or op.effects.random for op in launch.ops)
    values = frame.values
    fresh = {v.id for op in launch.ops for v in op.results if v.id in places.maker}
    scratch = _overwritten(launch, places) - fresh
    inside = [number for root in fresh | scratch for number in places.family[root]]
    frame.elsewhere = fresh | scratch
    for number in inside:
        values[number] = None
    for number in scratch:
        type_ = places.root[number].type
        values[number] = torch.empty_strided(type_.shape, type_.stride, dtype=type_.dtype, device=type_.device)
    for step in (step for kernel in launch.kernels for step in kernel.steps):
        unread = _bring(step, places, frame)
        _call(step.op, frame, relieve)
        for number in unread:
            values[number] = None
    stored = {places.root[store.access.value.id].id for kernel in launch.kernels for store in kernel.stores}
    for number in fresh & stored:
        frame.memory_of(number).copy_(values[number])
    for number in inside:
        values[number] = frame.furnished.get(number)
    frame.elsewhere = set()
    frame.partial = False


def _overwritten(launch: Launch, places: Places) -> set[int]:
    """Roots that the ops write, but of which the kernels neither read nor store anything: for the planner they died before,
    and what it puts into their memory now must be left alone."""
    accesses = [a for kernel in launch.kernels for a in (*kernel.loads, *(store.access for store in kernel.stores))]
    written = {places.root[before.id].id for op in launch.ops for before, _ in op.rewritten}
    return written - {places.root[a.value.id].id for a in accesses}


def _bring(step: Step, places: Places, frame: Frame) -> list[int]:
    """Tensors for the operands of a step; returns the numbers of those that only stand for a shape, as `x` in ones_like(x).

    Their memory may be gone: for the planner, what is not read is not used.
    """
    written = {before.id for before, _ in step.op.rewritten}
    unread = []
    for value, operand in zip(step.op.inputs, step.operands, strict=True):
        if operand is not None or value.id in written:
            tensor_of(value, places, frame)
        elif frame.values[value.id] is None:
            type_ = value.type
            frame.values[value.id] = torch.empty_strided(type_.shape, type_.stride, dtype=type_.dtype, device=type_.device)
            unread.append(value.id)
    return unread


def tensor_of(value: Value, places: Places, frame: Frame) -> torch.Tensor:
    """A tensor for a value of which a kernel needed the address only; it is kept in `frame.values`."""
    values = frame.values
    lent = frame.layout.arena.get(places.root[value.id].id) if places.root[value.id].id not in frame.elsewhere else None
    # What it comes from first, and not each by the one before: there may be thousands of writes and views, each of the last.
    waiting = [value]
    while values[waiting[-1].id] is None and (source := _source(waiting[-1], places, lent is not None)) is not None:
        waiting.append(source)
    for one in reversed(waiting):
        number = one.id
        if values[number] is not None:
            continue
        if number in places.before:
            values[number] = values[places.before[number].id]
        elif number not in places.view_op:
            values[number] = frame.memory_of(number)
        elif lent is not None:
            # Not by the op: as_strided counts from the start of the memory, which is here that of the whole arena.
            values[number] = frame.in_arena(lent[0] + places.place(one).nbytes, one.type)
        else:
            call(places.view_op[number], values, frame.scalars)
    tensor: torch.Tensor = values[value.id]
    return tensor


def _source(value: Value, places: Places, in_arena: bool) -> Value | None:
    """The version before a write, or what a view is of where it is not made from the arena itself."""
    if value.id in places.before:
        return places.before[value.id]
    return places.view_op[value.id].inputs[0] if value.id in places.view_op and not in_arena else None


def may_have_begun(op: Op) -> bool:
    """Can the op have written one operand when it runs out of memory for another, or drawn random numbers? Where there is one
    operand, kernels allocate first."""
    return len(op.rewritten) > 1 or may_have_drawn(op.target, op.effects.random)


def _call(op: Op, frame: Frame, relieve: Callable[[], None]) -> None:
    try:
        return call(op, frame.values, frame.scalars)
    except torch.OutOfMemoryError:
        if may_have_begun(op):
            raise
    # Outside of the handler: the error would keep alive what the call had allocated.
    relieve()
    frame.find_inputs()
    call(op, frame.values, frame.scalars)
