"""Regions seen before, as a trie: a node is one op after one certain sequence of ops.

A known op costs one dictionary lookup, and the last node of a region is the region's key.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from kitsune.ir import Op, OpRow, OutputSpec, Site, Slot, TensorType, Value
from kitsune.ir.graph import Operand, Result
from kitsune.lazy.cell import Cell, Ref, ref
from kitsune.lazy.tensor import wrapper_maker

# Forms of a return value, by how often training steps have them: the first two need no rebuilding.
ONE, SELF, NOTHING, GENERAL = range(4)


@dataclass(slots=True, eq=False)
class Node:
    """One op after one sequence of ops. Numbers of values, storages and scalars count from the region's start."""

    parent: "Node | None" = None
    row: OpRow | None = None
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()
    # (value, type, storage) of the tensors that came in with this op
    admitted: tuple[tuple[int, TensorType, int], ...] = ()
    # (value, type, storage) of each new tensor
    results: tuple[tuple[Ref, TensorType, int], ...] = ()
    # (operand, value before, value after, storage) of each operand written
    written: tuple[tuple[int, int, Ref, int], ...] = ()
    structure: Any = None
    form: int = NOTHING
    grad_enabled: bool | None = None
    site: Site | None = None
    depth: int = 0
    n_values: int = 0
    n_storages: int = 0
    n_scalars: int = 0
    nbytes: int = 0
    random: bool = False
    full: bool = False
    # The two commonest calls take no rebuilding. One new tensor and nothing written: what makes its wrapper, and its result.
    make: Callable[[], Any] | None = None
    result: tuple[Any, Any, int] = (None, None, 0)
    # The first operand is written and returned: its value afterwards, and its storage.
    rewrites: Ref | None = None
    storage: int = 0
    # how often this op was observed at this place, whether that is enough, and what is counted of regions that end here
    sights: int = 0
    known: bool = False
    tally: Any = None
    # The values that came in and the op, once a graph was made of a path through here.
    entered: tuple[Value, ...] = ()
    op: Op | None = None
    children: dict[Any, "Node"] = field(default_factory=dict)
    # Whole calls of torch's API that begin here, by key; see `edges.py`.
    calls: dict[Any, Any] = field(default_factory=dict)
    # What reads of its values gave that are the same each time; see `constants.py`.
    constants: dict[Any, Any] = field(default_factory=dict)
    # What is read of regions that end here; see `early_reads.py`.
    reads: Any = None
    # What takes the call of a function that has come most often; see `matchers.py`.
    matchers: dict[Any, Any] = field(default_factory=dict)
    # Torch's modules that are called here, whose calls have matchers by their ids; see `module_calls.py`.
    modules: dict[int, Any] = field(default_factory=dict)

    def path(self) -> list["Node"]:
        """The nodes from the region's first op to this one."""
        nodes: list[Node] = []
        node = self
        while node.parent is not None:
            nodes.append(node)
            node = node.parent
        nodes.reverse()
        return nodes


def grow(region: Any, row: OpRow, args: Any, kwargs: Any, cells: list[Cell], flat: list[Any], spec: OutputSpec) -> Node:
    """A new node below the region's, for a call on `flat` (whose cells are `cells`) that returns what `spec` says."""
    parent = region.node
    refs = [cell.ref for cell in cells]
    names = dict(zip(map(id, flat), refs, strict=True))
    slots = iter(range(parent.n_scalars, len(region.scalars))) if row.scalars_move else None
    node = Node(
        parent=parent,
        row=row,
        args=_named(args, names, slots),
        kwargs=tuple(zip(kwargs, _named(kwargs.values(), names, slots), strict=True)) if kwargs else (),
        admitted=tuple([(number, type_, storage) for number, type_, storage, _ in region.admitted]),
        structure=spec.structure,
        form=_form(spec),
        grad_enabled=torch.is_grad_enabled() if row.sees_grad_mode else None,
        depth=parent.depth + 1,
        n_values=parent.n_values + len(region.admitted),
        n_storages=region.n_storages(),
        n_scalars=len(region.scalars),
        random=parent.random or row.random,
    )
    if row.writes:
        node.written = _writes(node, written_operands(row, args, kwargs), flat, cells)
    node.results = _results(node, spec, cells)
    if node.form == ONE and not node.written:
        node.make, node.result = wrapper_maker(node.results[0][1]), node.results[0]
    elif node.form == SELF and len(node.written) == 1 and node.written[0][0] == spec.structure.index == 0 and not row.bumps:
        _, _, node.rewrites, node.storage = node.written[0]
    node.nbytes = parent.nbytes
    for _, type_, _ in (*node.results, *node.admitted):
        node.nbytes += type_.nbytes
    return node


def agrees(node: Node, spec: OutputSpec, cells: list[Cell]) -> bool:
    """Did the call return what the node promises?"""
    if node.structure != spec.structure or len(node.results) != len(spec.results):
        return False
    for (_, type_, storage), (seen, alias) in zip(node.results, spec.results, strict=True):
        if type_ is not seen or (alias is not None and alias >= 0 and cells[alias].storage != storage):
            return False
    return True


def leaves(tree: Any) -> Iterator[Any]:
    """What is in a node's arguments: numbers of values, slots and constants."""
    if isinstance(tree, tuple):
        for x in tree:
            yield from leaves(x)
    else:
        yield tree


def written_operands(row: OpRow, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[torch.Tensor]:
    """The tensors that a call writes, by its row."""
    for position, name in row.writes:
        argument = args[position] if position < len(args) else kwargs.get(name)
        if isinstance(argument, torch.Tensor):
            yield argument
        elif argument is not None:
            yield from argument


def _writes(node: Node, operands: Iterator[torch.Tensor], flat: list[Any], cells: list[Cell]) -> tuple[Any, ...]:
    before = {id(t): cell.ref.id for t, cell in zip(flat, cells, strict=True) if cell.ref is not None}
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


def _named(arguments: Iterable[Any], names: dict[int, Any], slots: Iterator[int] | None) -> tuple[Any, ...]:
    """Arguments with numbers of values in place of tensors, and with slots in that of floats where these move."""
    named: list[Any] = []
    for a in arguments:
        if type(a) is float:
            named.append(a if slots is None else Slot(next(slots)))
        elif isinstance(a, torch.Tensor):
            named.append(names[id(a)])
        elif isinstance(a, (list, tuple)):
            named.append(_named(a, names, slots))
        else:
            named.append(a)
    return tuple(named)
