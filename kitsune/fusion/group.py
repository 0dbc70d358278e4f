"""A group: pointwise ops that may become one kernel. `why_not` is the law; it never reads a clock, a device or a cost."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from kitsune.fusion.factors import Factors, Layout
from kitsune.ir import Kind, Local, Op, TensorType, Value

# The bound on a kernel's registers and parameters; 64 is where compilers of the field stop too.
MAX_OPS = 64
MAX_LOADS = 24
# The first operand is overwritten, or asked for its shape only, and not read.
OVERWRITES = {"copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_", "ones_like", "zeros_like", "full_like"}
# Declares that it writes the gradients (argument 1), but does so only where they are to be unscaled.
KEEPS_GRADIENTS = {"_fused_adam_", "_fused_adamw_", "_fused_sgd_"}

# Which value a value is a view of.
Roots = Mapping[int, Value]


def base_name(op: Op) -> str:
    """The op's name without its overload."""
    name: str = op.target._opname
    return name


def shape_of(op: Op) -> torch.Size:
    """The shape that a pointwise op works on: of its first output."""
    return op.outputs[0].type.shape


def written(op: Op) -> list[tuple[int, Value, Value]]:
    """What an op really writes: output number, value before, value after."""
    first = len(op.results)
    pairs = [(first + k, before, after) for k, (before, after) in enumerate(op.rewritten)]
    if base_name(op) in KEEPS_GRADIENTS:
        gradients = op.args[1]
        pairs = [pair for pair in pairs if pair[1] not in gradients]
    return pairs


@dataclass(frozen=True, slots=True)
class Use:
    """A tensor that the group reads or writes in memory, with the factors that its last dimensions run over."""

    value: Value
    layout: Layout


@dataclass(frozen=True, slots=True)
class Member:
    """An op of the group: where it stands in the graph, and where each of its operands comes from."""

    number: int
    op: Op
    layout: Layout
    operands: tuple[Use | Local | None, ...]


def why_not(group: "Group", number: int, op: Op) -> str | None:
    """Why this op may not join the group, as a sentence; None if it may. The group stays as it is."""
    return group.copy().add(number, op)


class Group:
    """Ops in program order, and what is known of every tensor that they touch."""

    __slots__ = ("factors", "loaded", "max_ops", "members", "produced", "roots", "shared_bytes", "whole")

    def __init__(self, roots: Roots, max_ops: int = MAX_OPS) -> None:
        self.roots, self.max_ops = roots, max_ops
        self.factors = Factors()
        self.members: list[Member] = []
        # The layout of the first op's shape, with which every other shape must agree.
        self.whole: Layout = ()
        # By storage: what it holds now (the register, the value) and under which layout.
        self.produced: dict[int, tuple[Local, Value, Layout]] = {}
        self.loaded: dict[int, list[Use]] = {}
        # Bytes that the last op added found in registers or among the loads.
        self.shared_bytes = 0

    def copy(self) -> "Group":
        """An independent copy, to try something on."""
        twin = Group(self.roots, self.max_ops)
        twin.factors, twin.members, twin.whole = self.factors.copy(), self.members.copy(), self.whole
        twin.produced = self.produced.copy()
        twin.loaded = {storage: list(uses) for storage, uses in self.loaded.items()}
        return twin

    def add(self, number: int, op: Op) -> str | None:
        """Take an op in. A refusal is a sentence and leaves the group unusable: try on a copy."""
        self.shared_bytes = 0
        if len(self.members) >= self.max_ops:
            return f"the kernel would have more than {self.max_ops} operators"
        layout = self._layout_of(op)
        if isinstance(layout, str):
            return layout
        operands: list[Use | Local | None] = []
        for k, value in enumerate(op.inputs):
            if k == 0 and base_name(op) in OVERWRITES:
                operands.append(None)
                continue
            operand = self._operand(value, layout)
            if isinstance(operand, str):
                return operand
            operands.append(operand)
        reason = self._write(op, layout)
        if reason is None:
            self.members.append(Member(number, op, layout, tuple(operands)))
        if sum(map(len, self.loaded.values())) > MAX_LOADS:
            return f"the kernel would have more than {MAX_LOADS} operands from memory"
        return reason

    def _layout_of(self, op: Op) -> Layout | str:
        """The op's shape in the group's factors."""
        shape = shape_of(op)
        if any(v.type.shape != shape for v in op.outputs):
            return "its results differ in shape"
        if not self.members:
            self.whole = tuple((self.factors.new(n),) if n > 1 else () for n in shape)
            return self.whole
        found: Layout | None = None
        for value in op.inputs:
            if value.storage not in self.produced:
                continue
            layout = self._layout_of_register(value, len(shape))
            if isinstance(layout, str):
                return layout
            if found is not None and self.factors.now(found) != layout:
                return "it combines two views of one tensor that see its elements in different orders"
            found = layout
        shared = self._layout_of_sibling(op) if found is None else found
        if isinstance(shared, str):
            return shared
        found = self.factors.now(shared)
        if self.factors.shape(found) != tuple(shape) or sum(map(len, found)) != len(self.factors.sizes):
            return "it works on another number of elements"
        return found

    def _layout_of_register(self, value: Value, n_dims: int) -> Layout | str:
        _, made, layout = self.produced[value.storage]
        if self.roots[made.id] is not self.roots[value.id]:
            return "it reads memory that the kernel writes, through another tensor"
        layout = self.factors.now(layout)
        if value.type.shape != made.type.shape or value.type.stride != made.type.stride or value.type.offset != made.type.offset:
            if value.type.offset != made.type.offset:
                return "it reads a part of what the kernel writes"
            base = self.factors.strides(made.type, layout)
            seen = self.factors.layout_of_view(base, value.type)
            if seen is None:
                return "it reads what the kernel writes through a view that is not one to one"
            layout = self.factors.now(seen)
        return ((),) * (n_dims - len(layout)) + layout

    def _layout_of_sibling(self, op: Op) -> Layout | str:
        """Of an op that reads nothing of the group's registers: the group's own, if the shapes are the same."""
        shape = shape_of(op)
        first = shape_of(self.members[0].op)
        return self.whole if shape == first else "it works on another shape"

    def _operand(self, value: Value, layout: Layout) -> Use | Local | str:
        held = self.produced.get(value.storage)
        if held is not None:
            self.shared_bytes += 2 * value.type.nbytes
            return held[0]
        use = Use(value, layout)
        uses = self.loaded.setdefault(value.storage, [])
        for other in uses:
            if self._same_elements(other, use):
                self.shared_bytes += value.type.nbytes
                return other
        uses.append(use)
        return use

    def _write(self, op: Op, layout: Layout) -> str | None:
        step = len(self.members)
        for k, value in enumerate(op.results):
            self.produced[value.storage] = (Local(step, k), value, layout)
        for output, before, after in written(op):
            use = Use(before, layout)
            held = self.produced.get(before.storage)
            others = [*self.loaded.get(before.storage, ()), *([Use(held[1], held[2])] if held else ())]
            if not all(self._same_elements(other, use) for other in others):
                return "it writes memory that the kernel reads or writes in another order"
            self.produced[before.storage] = (Local(step, output), after, layout)
        return None

    def _same_elements(self, a: Use, b: Use) -> bool:
        """Does each element of the domain see the same address through both?"""
        one, two = a.value.type, b.value.type
        if self.roots[a.value.id] is not self.roots[b.value.id] or one.offset != two.offset:
            return False
        return self.strides(a) == self.strides(b)

    def strides(self, use: Use) -> dict[int, int]:
        """The strides of a tensor along each factor."""
        return self.factors.strides(use.value.type, self.factors.now(use.layout))


def why_not_pointwise(op: Op, why_not_lowered: Callable[[Op], str | None]) -> str | None:
    """Why an op cannot be part of any kernel."""
    if op.kind is not Kind.POINTWISE:
        return f"{base_name(op)} is {op.kind.name.lower()}"
    if not op.outputs or op.effects.random:
        return f"{base_name(op)} draws random numbers" if op.effects.random else f"{base_name(op)} makes no tensor"
    if not op.outputs[0].type.nbytes:
        return "it has no elements"
    if len(set(op.effects.writes)) < len(op.effects.writes):
        return "it writes one tensor's memory twice"
    if any(_overlaps(after.type) for after in op.outputs):
        return "its result has several elements at one address"
    return why_not_lowered(op)


def _overlaps(type_: TensorType) -> bool:
    if type_.canonical:
        return False
    needed = 1
    for stride, size in sorted((s, n) for n, s in zip(type_.shape, type_.stride, strict=True) if n > 1):
        if stride < needed:
            return True
        needed = stride * size
    return False
