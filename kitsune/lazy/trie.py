"""Regions seen before, as a trie: a node is one op after one certain sequence of ops.

A known op costs one dictionary lookup, and the last node of a region is the region's key.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from kitsune.ir import Barrier, Op, OpRow, OutputSpec, TensorType, Value
from kitsune.lazy.cell import Cell, Ref

# Forms of a return value, by how often training steps have them: the first two need no rebuilding.
ONE, SELF, NOTHING, GENERAL = range(4)


@dataclass(slots=True, eq=False, repr=False)
class Node:
    """One op after one sequence of ops. Numbers of values, storages and scalars count from the region's start."""

    parent: "Node | None" = None
    row: OpRow | None = None
    # The values that came in with this op, and the op. They depend on the path alone, so that all graphs share them.
    entered: tuple[Value, ...] = ()
    op: Op | None = None
    # (value, type, storage) of each new tensor
    results: tuple[tuple[Ref, TensorType, int], ...] = ()
    # (operand, value before, value after, storage) of each operand written
    written: tuple[tuple[int, int, Ref, int], ...] = ()
    structure: Any = None
    form: int = NOTHING
    depth: int = 0
    n_values: int = 0
    n_storages: int = 0
    n_scalars: int = 0
    nbytes: int = 0
    random: bool = False
    # Why a region ends here, if it does; see `step_ends.py`.
    full: Barrier | None = None
    # The two commonest calls take no rebuilding. One new tensor and nothing written: what makes its wrapper, and its result.
    make: Callable[[], Any] | None = None
    result: tuple[Any, Any, int] = (None, None, 0)
    # The first operand is written and returned: its value afterwards, and its storage.
    rewrites: Ref | None = None
    storage: int = 0
    # how often this op was observed at this place, and whether that is enough
    sights: int = 0
    known: bool = False
    # What is counted of regions that end here, by the node after which they begin; see `cuts.py`.
    tallies: Any = None
    # By the calls whose graph is owed: the values that autograd has saved of them, as far as here. And is a backward to be
    # expected, where a number is read here? See `cuts.py`.
    saved: Any = None
    expects: int = 1
    # How the program held what was made, when a number was read here (see `holds.py`), and what was kept then.
    holds: Any = None
    keeps: Any = None
    children: dict[Any, "Node"] = field(default_factory=dict)
    # Whole calls of torch's API that begin here, by key; see `edges.py`.
    calls: dict[Any, Any] = field(default_factory=dict)
    # What reads of its values gave that are the same each time; see `constants.py`.
    constants: dict[Any, Any] = field(default_factory=dict)
    # By what whole numbers tensors are divided here; see `growing_numbers.py`.
    numbers: Any = None
    # What is read of regions that end here; see `early_reads.py`.
    reads: Any = None
    # What takes the call of a function that has come most often; see `matchers.py`.
    matchers: dict[Any, Any] = field(default_factory=dict)
    # How many elements were named by the masks that came here, and the numbers that parts were set to; see `items.py`.
    named: frozenset[Any] = frozenset()
    # Modes under which calls come where autocast has forgotten its casts here; see `casts.py`.
    modes: Any = None
    # Torch's modules that are called here, whose calls have matchers by their ids; see `module_calls.py`.
    modules: dict[int, Any] = field(default_factory=dict)

    def path(self, after: "Node | None" = None) -> list["Node"]:
        """The nodes behind `after`, by default from the region's first op, to this one."""
        nodes: list[Node] = []
        node = self
        while node is not after and node.parent is not None:
            nodes.append(node)
            node = node.parent
        nodes.reverse()
        return nodes


def agrees(node: Node, spec: OutputSpec, cells: list[Cell]) -> bool:
    """Did the call return what the node promises?"""
    if node.structure != spec.structure or len(node.results) != len(spec.results):
        return False
    for (_, type_, storage), (seen, alias) in zip(node.results, spec.results, strict=True):
        if type_ is not seen or (alias is not None and alias >= 0 and cells[alias].storage != storage):
            return False
    return True


def written_operands(row: OpRow, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[torch.Tensor]:
    """The tensors that a call writes, by its row."""
    for position, name in row.writes:
        argument = args[position] if position < len(args) else kwargs.get(name)
        if isinstance(argument, torch.Tensor):
            yield argument
        elif argument is not None:
            yield from argument
