"""A new node of the trie: the op with its values, and what is to be done when it comes again."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from kitsune.ir import Effects, Kind, Op, OpRow, OutputSpec, Site, Slot, TensorType, Value
from kitsune.ir.graph import PURE, Operand, Result
from kitsune.lazy.cell import Cell, Ref, ref
from kitsune.lazy.rebuild import ATOMS
from kitsune.lazy.tensor import wrapper_maker
from kitsune.lazy.trie import GENERAL, NOTHING, ONE, SELF, Node, written_operands


class Values:
    """The values of a region in progress by number, and how often each storage was written, up to one of its nodes."""

    __slots__ = ("_at", "_versions", "by_number")

    def __init__(self, root: Node) -> None:
        self.by_number: dict[int, Value] = {}
        self._versions: dict[int, int] = {}
        self._at = root

    def reach(self, node: Node) -> None:
        """Have those up to a node, which is no earlier one than the last."""
        by_number, versions = self.by_number, self._versions
        # Mostly it is the next one.
        for later in (node,) if node.parent is self._at else node.path(self._at):
            assert later.op is not None
            for value in later.entered:
                by_number[value.id] = value
            for value in later.op.results:
                by_number[value.id] = value
            for _, value in later.op.rewritten:
                by_number[value.id] = value
                versions[value.storage] = value.version
        self._at = node

    def new(self, number: int, type_: TensorType, storage: int, n_writes: int = 0) -> Value:
        """A value of the node after that, which has written its storage so often. The node may come to nothing: it is counted
        when it is reached."""
        value = self.by_number[number] = Value(number, type_, storage, self._versions.get(storage, 0) + n_writes)
        return value


def grow(
    region: Any, row: OpRow, args: Any, kwargs: Any, cells: list[Cell], flat: list[Any], spec: OutputSpec, site: Site | None
) -> Node:
    """A new node below the region's, for a call on `flat` (whose cells are `cells`) that returns what `spec` says."""
    parent, values = region.node, region.values
    values.reach(parent)
    entered: tuple[Value, ...] = ()
    if region.admitted:
        entered = tuple([values.new(number, type_, storage) for number, type_, storage, _ in region.admitted])
    node = Node(
        parent=parent,
        row=row,
        entered=entered,
        structure=spec.structure,
        form=_form(spec),
        depth=parent.depth + 1,
        n_values=parent.n_values + len(entered),
        n_storages=region.n_storages() if entered else parent.n_storages,
        n_scalars=len(region.scalars),
        nbytes=parent.nbytes,
        random=parent.random or row.random,
    )
    slots = iter(range(parent.n_scalars, node.n_scalars)) if row.scalars_move else None
    # Walked over in the order of `flat`.
    inputs = [values.by_number[cell.ref.id] for cell in cells]
    operands = iter(inputs)
    op_args = _with_values(args, operands, slots)
    op_kwargs = tuple(zip(kwargs, _with_values(kwargs.values(), operands, slots), strict=True)) if kwargs else ()
    if row.writes:
        node.written = _writes(node, written_operands(row, args, kwargs), flat, cells)
    node.results = _results(node, spec, cells)
    node.op = _op(node, row, op_args, op_kwargs, inputs, values, site)
    if node.form == ONE and not node.written:
        node.make, node.result = wrapper_maker(node.results[0][1]), node.results[0]
    elif node.form == SELF and len(node.written) == 1 and node.written[0][0] == spec.structure.index == 0 and not row.bumps:
        _, _, node.rewrites, node.storage = node.written[0]
    for value in (*node.op.results, *entered):
        node.nbytes += value.type.nbytes
    return node


def _op(node: Node, row: OpRow, args: Any, kwargs: Any, inputs: list[Value], values: Values, site: Site | None) -> Op:
    n_writes: dict[int, int] = {}
    rewritten = []
    for _, number, after, storage in node.written:
        n_writes[storage] = n_writes.get(storage, 0) + 1
        before = values.by_number[number]
        rewritten.append((before, values.new(after.id, before.type, storage, n_writes[storage])))
    results = tuple([values.new(number.id, type_, storage, n_writes.get(storage, 0)) for number, type_, storage in node.results])
    kind = row.kind
    if kind is Kind.VIEW and not _are_views(results, inputs):
        # In inference mode reshape, contiguous and `to` come by as they are, and this one had to copy.
        kind = Kind.EXTERN
    return Op(
        row.target,
        kind,
        args,
        kwargs,
        tuple(inputs),
        node.structure,
        results,
        tuple(rewritten),
        Effects(tuple([after.storage for _, after in rewritten]), row.random) if rewritten or row.random else PURE,
        torch.is_grad_enabled() if row.sees_grad_mode else None,
        site,
    )


def _are_views(results: tuple[Value, ...], inputs: list[Value]) -> bool:
    """Has each result the memory of an operand?"""
    if len(results) == 1 and inputs and results[0].storage == inputs[0].storage:
        return True
    return {v.storage for v in results} <= {v.storage for v in inputs}


def _writes(node: Node, operands: Iterator[torch.Tensor], flat: list[Any], cells: list[Cell]) -> tuple[Any, ...]:
    before = {id(t): cell.ref.id for t, cell in zip(flat, cells, strict=True)}
    places: dict[int, int] = {}
    for k, tensor in enumerate(flat):
        places.setdefault(id(tensor), k)
    written = []
    for tensor in operands:
        k = places[id(tensor)]
        after = ref(node.n_values)
        node.n_values += 1
        written.append((k, before[id(tensor)], after, cells[k].storage))
        before[id(tensor)] = after.id
    return tuple(written)


def _results(node: Node, spec: OutputSpec, cells: list[Cell]) -> tuple[Any, ...]:
    results: list[tuple[Ref, TensorType, int]] = []
    for type_, alias in spec.results:
        if alias is None:
            storage = node.n_storages
            node.n_storages += 1
        else:
            storage = cells[alias].storage if alias >= 0 else results[-alias - 1][-1]
        results.append((ref(node.n_values), type_, storage))
        node.n_values += 1
    return tuple(results)


def _form(spec: OutputSpec) -> int:
    cls = type(spec.structure)
    if cls is Result:
        return ONE
    if cls is Operand:
        return SELF
    return NOTHING if spec.structure is None else GENERAL


def _with_values(arguments: Iterable[Any], operands: Iterator[Value], slots: Iterator[int] | None) -> tuple[Any, ...]:
    """Arguments with the operands, in their order, in place of tensors, and Slots in that of floats that move."""
    found: list[Any] = []
    for a in arguments:
        cls = type(a)
        if cls is float and slots is not None:
            found.append(Slot(next(slots)))
        elif cls in ATOMS:
            found.append(a)
        elif isinstance(a, torch.Tensor):
            found.append(next(operands))
        elif isinstance(a, (list, tuple)):
            found.append(_with_values(a, operands, slots))
        else:
            found.append(a)
    return tuple(found)
