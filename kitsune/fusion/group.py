"""A group: ops that may become one kernel. `why_not` is the law; it never reads a clock, a device or a cost.

With a reduction in it, the group's elements are rows. Its ops are then of two levels: of every element, or of a row, whose
tensors have the factors that are left. Sums across rows may be in it beside that, gathered while rows come by: nothing can be
made of them before the last row is done.
"""

import math
from collections.abc import Mapping

import torch

from kitsune.fusion.factors import Factors, Layout
from kitsune.fusion.members import Member, Use, base_name, shape_of, written
from kitsune.ir import OVERWRITES, UNREAD, Kind, Local, Op, Reduction, Value, left_of, named, reduction_of

# The bound on a kernel's registers and parameters; 64 is where compilers of the field stop too.
MAX_OPS = 64
MAX_LOADS = 24
# Which value a value is a view of.
Roots = Mapping[int, Value]


def why_not(group: "Group", number: int, op: Op) -> str | None:
    """Why this op may not join the group, as a sentence; None if it may. The group stays as it is."""
    return group.copy().add(number, op)


class Group:
    """Ops in program order, and what is known of every tensor that they touch."""

    __slots__ = (
        "across",
        "factors",
        "gathered",
        "loaded",
        "max_ops",
        "members",
        "positional",
        "produced",
        "reduced",
        "roots",
        "shared_bytes",
        "totals",
        "whole",
    )

    def __init__(self, roots: Roots, max_ops: int = MAX_OPS, across: frozenset[int] = frozenset()) -> None:
        self.roots, self.max_ops = roots, max_ops
        # The numbers of ops that are sums across rows, the factors that these reduce, and the storages of what they make.
        self.across, self.gathered = across, tuple[int, ...]()
        self.totals: frozenset[int] = frozenset()
        self.factors = Factors()
        self.members: list[Member] = []
        # The layout of the first op's shape, with which every other shape must agree.
        self.whole: Layout = ()
        # The factors that are reduced; `positional` where their order must be that of the op.
        self.reduced: tuple[int, ...] = ()
        self.positional = False
        # By storage: what it holds now (the register, the value) and under which layout.
        self.produced: dict[int, tuple[Local, Value, Layout]] = {}
        self.loaded: dict[int, list[Use]] = {}
        # Bytes that the last op added found in registers or among the loads.
        self.shared_bytes = 0

    def copy(self) -> "Group":
        """An independent copy, to try something on."""
        twin = Group(self.roots, self.max_ops, self.across)
        twin.gathered, twin.totals = self.gathered, self.totals
        twin.factors, twin.members, twin.whole = self.factors.copy(), self.members.copy(), self.whole
        twin.produced, twin.reduced, twin.positional = self.produced.copy(), self.reduced, self.positional
        twin.loaded = {storage: list(uses) for storage, uses in self.loaded.items()}
        return twin

    def add(self, number: int, op: Op) -> str | None:
        """Take an op in. A refusal is a sentence and leaves the group unusable: try on a copy."""
        self.shared_bytes = 0
        if len(self.members) >= self.max_ops:
            return f"the kernel would have more than {self.max_ops} operators"
        if Kind.WINDOW in (op.kind, *(member.op.kind for member in self.members[:1])):
            return self._add_window(number, op)
        if self.totals and any(v.storage in self.totals for v in op.inputs):
            return "it reads a sum that is complete only after the last row"
        layout = self._layout_of(op, number in self.across)
        if isinstance(layout, str):
            return layout
        reduction = reduction_of(op)
        operands: list[Use | Local | None] = []
        for k, value in enumerate(op.inputs):
            if (k == 0 and base_name(op) in OVERWRITES) or UNREAD.get(base_name(op)) == k:
                operands.append(None)
                continue
            along = None if reduction is None else reduction.along.get(k)
            operand = self._operand(value, layout if along is None else tuple(layout[d] for d in along))
            if isinstance(operand, str):
                return operand
            operands.append(operand)
        reason = self._write(op, layout)
        if reason is None:
            self.members.append(Member(number, op, layout, tuple(operands)))
        if sum(map(len, self.loaded.values())) > MAX_LOADS:
            return f"the kernel would have more than {MAX_LOADS} operands from memory"
        return reason

    def _add_window(self, number: int, op: Op) -> str | None:
        if self.members:
            return "it is over windows of an image, which nothing else joins"
        # Of the image itself, a backward takes only the shape.
        read = [v for v in op.inputs if v is not named(op)["self"] or "grad_output" not in named(op)]
        operands = tuple(Use(v, ()) if v in read else None for v in op.inputs)
        self.members.append(Member(number, op, (), operands))
        self.produced = {v.storage: (Local(0, k), v, ()) for k, v in enumerate(op.results)}
        return None

    def _layout_of(self, op: Op, gathers: bool) -> Layout | str:
        """The shape that the op works on, in the group's factors."""
        reduction = reduction_of(op)
        shape = shape_of(op)
        if reduction is None and any(v.type.shape != shape for v in op.outputs):
            return "its results differ in shape"
        if not self.members:
            self.whole = tuple((self.factors.new(n),) if n > 1 else () for n in shape)
            found: Layout | str = self.whole
        else:
            found = self._layout_by_operands(op, reduction, shape)
        if isinstance(found, str):
            return found
        level = {f for dim in found for f in dim}
        if reduction is not None:
            return self._gather(op, reduction, found) if gathers else self._reduce(reduction, found)
        if level != set(self.factors.sizes) and not (self.reduced and level == self._kept()):
            return "it works on another number of elements"
        return found

    def _layout_by_operands(self, op: Op, reduction: Reduction | None, shape: torch.Size) -> Layout | str:
        """From what the op reads of the group's registers; what they are broadcast along, as other ops of the group have it."""
        seen: list[Layout] = []
        for k, value in enumerate(op.inputs):
            if value.storage not in self.produced:
                continue
            along = None if reduction is None else reduction.along.get(k)
            layout = self._layout_of_register(value, len(shape), along)
            if isinstance(layout, str):
                return layout
            seen.append(layout)
        if not seen:
            return self._layout_of_sibling(shape)
        joined: list[tuple[int, ...]] = [()] * len(shape)
        in_order = True
        for layout in map(self.factors.now, seen):
            in_order = in_order and not any(a and b and a != b for a, b in zip(joined, layout, strict=True))
            joined = [a or b for a, b in zip(joined, layout, strict=True)]
        factors = [f for dim in joined for f in dim]
        if not in_order or len(set(factors)) < len(factors):
            return "it combines two views of one tensor that see its elements in different orders"
        found: Layout = tuple(joined)
        if self.factors.shape(found) != tuple(shape) and self.reduced:
            found = self._broadcast(found, shape)
        return found if self.factors.shape(found) == tuple(shape) else "it works on another number of elements"

    def _broadcast(self, layout: Layout, shape: torch.Size) -> Layout:
        """The layout of a member of this shape that agrees with what is known of it; the layout itself if there is none."""
        for member in self.members:
            known = self.factors.now(member.layout)
            if self.factors.shape(known) == tuple(shape) and all(not a or a == b for a, b in zip(layout, known, strict=True)):
                return known
        return layout

    def _reduce(self, reduction: Reduction, layout: Layout) -> Layout | str:
        reduced = tuple(f for d in reduction.dims for f in layout[d])
        if {f for dim in layout for f in dim} != set(self.factors.sizes):
            return "it reduces what is reduced already"
        if not reduced:
            return "it reduces dimensions of a single element"
        known = self.factors.now((self.reduced,))[0]
        if self.reduced and (set(known) != set(reduced) or (reduction.positional and known != reduced)):
            return "it reduces other dimensions"
        if not set(reduced).isdisjoint(self.factors.now((self.gathered,))[0]):
            return "it reduces what is gathered of all rows"
        self.reduced = self.reduced or reduced
        self.positional = self.positional or reduction.positional
        return layout

    def _gather(self, op: Op, reduction: Reduction, layout: Layout) -> Layout | str:
        summed = tuple(f for d in reduction.dims for f in layout[d])
        known = self.factors.now((self.gathered,))[0]
        if base_name(op) != "sum" or {f for dim in layout for f in dim} != set(self.factors.sizes):
            return "it is no sum of all rows"
        if not summed or not set(summed).isdisjoint(self.factors.now((self.reduced,))[0]) or set(known or summed) != set(summed):
            return "it adds up other rows"
        self.gathered = self.gathered or summed
        self.totals |= {v.storage for v in op.results}
        return layout

    def _kept(self) -> set[int]:
        """The factors that no reduction reduces."""
        return set(self.factors.sizes) - set(self.factors.now((self.reduced,))[0])

    def _layout_of_register(self, value: Value, n_dims: int, along: tuple[int, ...] | None = None) -> Layout | str:
        _, made, layout = self.produced[value.storage]
        if self.roots[made.id] is not self.roots[value.id]:
            return "it reads memory that the kernel writes, through another tensor"
        layout = self.factors.now(layout)
        if value.type.shape != made.type.shape or value.type.stride != made.type.stride or value.type.offset != made.type.offset:
            if value.type.offset != made.type.offset:
                return "it reads a part of what the kernel writes"
            base = self.factors.strides(made.type, layout)
            seen = self.factors.layout_of_view(base, value.type.shape, value.type.stride)
            if seen is None:
                return "it reads what the kernel writes through a view that is not one to one"
            layout = self.factors.now(seen)
        return _placed(layout, n_dims, along)

    def _layout_of_sibling(self, shape: torch.Size) -> Layout | str:
        """Of an op that reads nothing of the group's registers: that of a member of the same shape, the first above all."""
        if shape == shape_of(self.members[0].op):
            return self.factors.now(self.whole)
        if self.reduced or self.gathered:
            shapes = [(shape_of(member.op), member.layout) for member in self.members]
            shapes += [(value.type.shape, layout) for _, value, layout in self.produced.values()]
            for known, layout in shapes:
                if known == shape:
                    return self.factors.now(layout)
        return self._in_the_same_order(shape)

    def _in_the_same_order(self, shape: torch.Size) -> Layout | str:
        """The layout of a shape whose elements are those of the first member's, counted in the same order."""
        strides, step = dict[int, int](), 1
        for factor in reversed([f for dim in self.factors.now(self.whole) for f in dim]):
            strides[factor] = step
            step *= self.factors.sizes[factor]
        if step != shape.numel():
            return "it works on another shape"
        steps = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
        found = self.factors.layout_of_view(strides, shape, steps)
        return "it works on another shape" if found is None else found

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
        reduction = reduction_of(op)
        for k, value in enumerate(op.results):
            own = layout if reduction is None else _of_result(reduction, value, layout)
            self.produced[value.storage] = (Local(step, k), value, own)
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
        """The strides of a tensor along the factors that it moves along."""
        found = self.factors.strides(use.value.type, self.factors.now(use.layout))
        return {factor: stride for factor, stride in found.items() if stride}


def _placed(layout: Layout, n_dims: int, along: tuple[int, ...] | None) -> Layout:
    """A layout of fewer dimensions among `n_dims`: as the last ones, or as those `along`."""
    if along is None:
        return ((),) * (n_dims - len(layout)) + layout
    return tuple(layout[along.index(d)] if d in along else () for d in range(n_dims))


def _of_result(reduction: Reduction, value: Value, layout: Layout) -> Layout:
    """The layout of a result: the whole, or what is left of it."""
    shape = tuple(value.type.shape)
    if shape == tuple(reduction.shape):
        return layout
    return left_of(reduction, layout, () if len(shape) == len(layout) else None)
