"""A planner without ideas and kernels without a compiler: what the plan executor is tested with."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch

from kitsune.ir import Access, Graph, Kernel, Kind, Launch, Load, Local, Op, Plan, Step, Store, TensorType, Value
from kitsune.runtime.calls import bind
from kitsune.runtime.out_forms import out_form
from kitsune.scheduler import needed_ops


def plan_of(graph: Graph, *, kernels: bool = True, arena: bool = True, most: int = 4) -> Plan:
    """A plan in program order: runs of at most `most` pointwise ops are kernels if `kernels`; everything else is a call."""
    groups: list[list[Op]] = []
    for op in needed_ops(graph):
        fits = kernels and is_pointwise(op)
        if fits and groups and is_pointwise(groups[-1][0]) and len(groups[-1]) < most and not _clash(groups[-1], op):
            groups[-1].append(op)
        else:
            groups.append([op])
    calls = {v.id for op in needed_ops(graph) if not (kernels and is_pointwise(op)) for v in op.inputs}
    launches = []
    for group in groups:
        if kernels and is_pointwise(group[0]):
            launches.append(Launch(kernels=(kernel_of(group, graph),)))
        elif group[0].kind is not Kind.VIEW or {v.id for v in group[0].results} & (calls | {v.id for v in graph.outputs}):
            launches.append(Launch(op=group[0]))
    offsets, size = offsets_of(graph, launches) if arena else ({}, 0)
    return Plan(graph, tuple(launches), offsets, size, drops_of(graph, launches, offsets))


def is_pointwise(op: Op) -> bool:
    """Can the kernels of this file do it? One new or one written dense tensor, of the shape of the widest operand."""
    if op.kind is not Kind.POINTWISE or len(op.outputs) != 1 or op.effects.random or not op.inputs:
        return False
    name = op.target.overloadpacket.__name__
    if name.startswith(("_foreach", "_fused", "_amp", "tril", "triu")) or not all(type(a) is not tuple for a in op.args):
        return False
    types = [v.type for v in (*op.inputs, *op.outputs)]
    return not any(t.conj or t.neg for t in types) and len(op.outputs[0].type.shape) >= max(len(t.shape) for t in types)


def _clash(group: list[Op], op: Op) -> bool:
    """Would one kernel load before a store what program order reads after it? A view of memory that the group writes."""
    made = {v.id for o in group for v in o.outputs}
    touched = {v.storage for o in group for v in o.outputs}
    read = {v.storage for o in group for v in o.inputs}
    return (
        any(v.storage in touched and v.id not in made for v in op.inputs)
        or any(v.storage in read | touched and op.rewritten for v in op.outputs)
        or tuple(op.outputs[0].type.shape) != tuple(group[0].outputs[0].type.shape)
    )


def kernel_of(group: list[Op], graph: Graph) -> Kernel:
    domain = tuple(group[0].outputs[0].type.shape)
    where: dict[int, Local] = {}
    loads: list[Value] = []
    steps = []
    for k, op in enumerate(group):
        operands: list[Load | Local] = []
        for v in op.inputs:
            if v.id not in where and v not in loads:
                loads.append(v)
            operands.append(where[v.id] if v.id in where else Load(loads.index(v)))
        steps.append(Step(op, tuple(operands)))
        where.update({v.id: Local(k, n) for n, v in enumerate(op.outputs)})
    # Only what somebody reads later; with one op in a group nearly every value is.
    inside = {id(op) for op in group}
    later = {v.storage for op in graph.ops if id(op) not in inside for v in op.inputs}
    later |= {v.storage for v in (*graph.outputs, *graph.inputs)}
    stores = tuple(Store(where[v.id], Access(v, walk(v.type, domain))) for op in group for v in op.outputs if v.storage in later)
    names = "_".join(str(op.target.overloadpacket).rpartition(".")[2] for op in group)
    return Kernel(names, domain, tuple(Access(v, walk(v.type, domain)) for v in loads), tuple(steps), stores)


def walk(type_: TensorType, domain: tuple[int, ...]) -> tuple[int, ...]:
    lacking = len(domain) - len(type_.shape)
    return (0,) * lacking + tuple(0 if n == 1 else s for n, s in zip(type_.shape, type_.stride, strict=True))


def offsets_of(graph: Graph, launches: list[Launch]) -> tuple[dict[int, int], int]:
    """Storages made by a kernel's store or by a call with an out= form; two that are never alive at once share bytes."""
    alive = {v.storage for v in (*graph.inputs, *graph.outputs)}
    uses: dict[int, list[int]] = {}
    made: dict[int, int] = {}
    for k, launch in enumerate(launches):
        for v in (v for op in launch.ops for v in (*op.inputs, *op.outputs)):
            uses.setdefault(v.storage, []).append(k)
        stored = {s.access.value.storage for kernel in launch.kernels for s in kernel.stores}
        for v in (v for op in launch.ops if op.kind is not Kind.VIEW for v in op.results):
            if v.storage not in alive and (v.storage in stored or (launch.op is not None and out_form(launch.op))):
                made.setdefault(v.storage, v.type.nbytes)
    placed: list[tuple[int, int, int, int]] = []
    for storage, nbytes in made.items():
        first, last, offset = min(uses[storage]), max(uses[storage]), 0
        for _, start, end, _ in sorted((p for p in placed if _meet(p[0], first, last, uses)), key=lambda p: p[1]):
            if start < offset + nbytes:
                offset = max(offset, end)
        placed.append((storage, offset, offset + -(-nbytes // 512) * 512, 0))
    return {s: start for s, start, _, _ in placed}, max([end for _, _, end, _ in placed], default=0)


def _meet(storage: int, first: int, last: int, uses: dict[int, list[int]]) -> bool:
    return min(uses[storage]) <= last and first <= max(uses[storage])


def drops_of(graph: Graph, launches: list[Launch], offsets: dict[int, int]) -> tuple[tuple[int, ...], ...]:
    kept = {v.storage for v in (*graph.inputs, *graph.outputs)} | set(offsets)
    last: dict[int, int] = {}
    for k, launch in enumerate(launches):
        last.update({v.storage: k for op in launch.ops for v in (*op.inputs, *op.outputs)})
    return tuple(tuple(s for s, when in last.items() if when == k and s not in kept) for k in range(len(launches)))


def at_address(address: int, dtype: torch.dtype, shape: Sequence[int], strides: Sequence[int]) -> torch.Tensor:
    """A tensor over memory of this process."""
    if not all(shape):
        return torch.empty(tuple(shape), dtype=dtype)
    extent = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1
    buffer = (ctypes.c_char * (extent * dtype.itemsize)).from_address(address)
    return torch.frombuffer(buffer, dtype=dtype).as_strided(shape, strides)


class FakeLaunch:
    """Does what a launch of kernels does, on the CPU: reads everything, computes in "registers", writes everything."""

    def __init__(self, launch: Launch) -> None:
        self.launch, self.name, self.starts = launch, launch.name, 0

    def start(self, address: Callable[[Access], int], scalars: list[float], stream: int) -> None:
        self.starts += 1
        for kernel in self.launch.kernels:
            self._run(kernel, address, scalars)

    def _run(self, kernel: Kernel, address: Callable[[Access], int], scalars: list[float]) -> None:
        def memory(access: Access) -> torch.Tensor:
            type_ = access.value.type
            return at_address(address(access), type_.dtype, type_.shape, type_.stride)

        loaded = [memory(access).clone() for access in kernel.loads]
        registers: dict[Local, torch.Tensor] = {}
        for k, step in enumerate(kernel.steps):
            values: dict[int, Any] = {}
            for v, operand in zip(step.op.inputs, step.operands, strict=True):
                values[v.id] = loaded[operand.index] if isinstance(operand, Load) else registers[operand]
            for before, _ in step.op.rewritten:
                values[before.id] = values[before.id].clone()
            table = [values.get(n) for n in range(max(values) + 1)]
            result = step.op.target(
                *[bind(a, table, scalars) for a in step.op.args], **{n: bind(a, table, scalars) for n, a in step.op.kwargs}
            )
            registers[Local(k, 0)] = result
        for store in kernel.stores:
            memory(store.access).copy_(registers[store.source])
