"""A Kernel from a plain function over tensors, without the planner: every op of it becomes a step of one kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kitsune.codegen import Compiler
from kitsune.codegen.machine_code import machine_code
from kitsune.ir import Effects, Kind, Op, Operand, Program, Result, Slot, Value, type_of
from kitsune.ir.plan import Access, Kernel, Load, Local, Step, Store

FACTORIES = {"full", "zeros", "ones"}


@dataclass
class Built:
    """A kernel; `read` and `written` are the tensors behind its loads and stores; `slots` the values of its moving numbers."""

    kernel: Kernel
    read: list[torch.Tensor]
    written: list[torch.Tensor]
    ops: list[Op]
    slots: list[float]


@dataclass
class _Recorder(TorchDispatchMode):
    """Runs each op on the real tensors and writes it down. A float given as `moving` becomes a Slot."""

    moving: tuple[float, ...] = ()
    ops: list[Op] = field(default_factory=list)
    current: dict[int, Value] = field(default_factory=dict)
    kept: list[torch.Tensor] = field(default_factory=list)
    slots: list[float] = field(default_factory=list)
    storages: dict[int, int] = field(default_factory=dict)
    n_values: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def value(self, tensor: torch.Tensor) -> Value:
        if id(tensor) not in self.current:
            self.current[id(tensor)] = self.new(tensor)
            self.kept.append(tensor)
        return self.current[id(tensor)]

    def new(self, tensor: torch.Tensor, version: int = 0) -> Value:
        self.n_values += 1
        storage = self.storages.setdefault(tensor.untyped_storage()._cdata, len(self.storages))
        return Value(self.n_values - 1, type_of(tensor), storage, version)

    def bind(self, argument: Any) -> Any:
        if isinstance(argument, torch.Tensor):
            return self.value(argument)
        if isinstance(argument, (list, tuple)):
            return tuple(self.bind(a) for a in argument)
        if type(argument) is float and argument in self.moving:
            self.slots.append(argument)
            return Slot(len(self.slots) - 1)
        return argument

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        bound, named = self.bind(args), tuple((k, self.bind(v)) for k, v in (kwargs or {}).items())
        inputs: list[Value] = []
        _collect((bound, [v for _, v in named]), inputs)
        written = [
            tensor
            for position, a in enumerate(func._schema.arguments)
            if a.alias_info is not None and a.alias_info.is_write and position < len(args)
            for tensor in (args[position] if isinstance(args[position], (list, tuple)) else [args[position]])
        ]
        before = [self.value(t) for t in written]
        result = func(*args, **(kwargs or {}))
        after = []
        for tensor, old in zip(written, before, strict=True):
            self.current[id(tensor)] = self.new(tensor, old.version + 1)
            after.append(self.current[id(tensor)])
        fresh = () if written else tuple(self.value(t) for t in ([result] if isinstance(result, torch.Tensor) else result))
        structure = Operand(0) if written else Result(0)
        effects = Effects(tuple(v.storage for v in before))
        op = Op(
            func, Kind.POINTWISE, bound, named, tuple(inputs), structure, fresh, tuple(zip(before, after, strict=True)), effects
        )
        self.ops.append(op)
        return result


def _collect(tree: Any, found: list[Value]) -> None:
    if isinstance(tree, Value):
        found.append(tree)
    elif isinstance(tree, (list, tuple)):
        for leaf in tree:
            _collect(leaf, found)


WRITE_ONLY = {"fill_", "zero_", "copy_", "_foreach_zero_", "_foreach_copy_", "ones_like", "zeros_like", "full_like"}


def build(
    function: Callable[..., Any], inputs: Sequence[Any], name: str = "kernel", moving: tuple[float, ...] = (), every: bool = False
) -> Built:
    """Run a function on copies of its tensors and make a kernel of what it did; stores its results, or `every` op's."""
    recorder = _Recorder(moving)
    with recorder:
        results = function(*inputs)
    results = [results] if isinstance(results, torch.Tensor) else list(results)
    return _assemble(recorder, results, name, every)


def _assemble(recorder: _Recorder, results: list[torch.Tensor], name: str, every: bool) -> Built:
    made: dict[int, Local] = {}
    loads: dict[int, int] = {}
    loaded: list[Value] = []
    steps = []
    for number, op in enumerate(recorder.ops):
        operands: list[Load | Local | None] = []
        skipped = op.inputs[0].id if op.target._schema.name.rpartition("::")[2] in WRITE_ONLY and op.inputs else None
        for position, v in enumerate(op.inputs):
            if position == 0 and v.id == skipped:
                operands.append(None)
            elif v.id in made:
                operands.append(made[v.id])
            else:
                if v.id not in loads:
                    loads[v.id] = len(loaded)
                    loaded.append(v)
                operands.append(Load(loads[v.id]))
        steps.append(Step(op, tuple(operands)))
        made.update({v.id: Local(number, i) for i, v in enumerate(op.outputs)})
    tensors = {recorder.current[id(t)].id: t for t in recorder.kept}
    stored = _stored(recorder, results, every)
    domain = torch.broadcast_shapes(*(v.type.shape for v in [*loaded, *stored]))
    kernel = Kernel(
        name,
        tuple(domain),
        tuple(Access(v, _strides(v, domain)) for v in loaded),
        tuple(steps),
        tuple(Store(made[v.id], Access(v, _strides(v, domain))) for v in stored),
    )
    by_storage = {}
    for t in recorder.kept:
        by_storage.setdefault((recorder.current[id(t)].storage, type_of(t)), t)
    read = [tensors.get(v.id, by_storage[(v.storage, v.type)]) for v in loaded]
    return Built(kernel, read, [by_storage[(v.storage, v.type)] for v in stored], recorder.ops, recorder.slots)


def compiled_kernel(compiler: Compiler, program: Program, arch: int, divisibility: int = 16, wide: bool = False) -> Any:
    """Triton's CompiledKernel of a variant, of which `asm` has every stage."""
    return machine_code(compiler.job_of(program, arch, divisibility, wide))


def _stored(recorder: _Recorder, results: list[torch.Tensor], every: bool) -> list[Value]:
    if every:
        return [v for op in recorder.ops for v in op.outputs]
    return [recorder.current[id(t)] for t in results]


def _strides(value: Value, domain: Sequence[int]) -> tuple[int, ...]:
    shape, stride = value.type.shape, value.type.stride
    padding = len(domain) - len(shape)
    return (0,) * padding + tuple(0 if n == 1 and d != 1 else s for n, s, d in zip(shape, stride, domain[padding:], strict=True))
