"""Where each value of a graph lies: which memory, and how many bytes into it."""

from dataclasses import dataclass

from kitsune.ir import Graph, Kind, Op, TensorType, Value


@dataclass(frozen=True, slots=True)
class Place:
    """`nbytes` after the first element of value number `root` or, if `from_start`, after the start of that value's memory."""

    root: int
    from_start: bool
    nbytes: int


class Places:
    """How each value of a graph comes about.

    `root[id]` is the value that a value is a view or a later version of, and `family[id]` has the numbers of all with that
    root. `before[id]` is the version before a write, `view_op[id]` the op that made a view, `maker[id]` the op that made a
    root; an input has none of them.
    """

    def __init__(self, graph: Graph) -> None:
        self.inputs = {v.id for v in graph.inputs}
        self.root: dict[int, Value] = {v.id: v for v in graph.inputs}
        self.before: dict[int, Value] = {}
        self.view_op: dict[int, Op] = {}
        self.maker: dict[int, Op] = {}
        self.family: dict[int, list[int]] = {}
        self.by_storage: dict[int, list[int]] = {}
        # Values whose offsets count from the start of the memory of an input.
        self._absolute: set[int] = set()
        for op in graph.ops:
            self._add(op)
        for value in (*graph.inputs, *(v for op in graph.ops for v in op.outputs)):
            self.by_storage.setdefault(value.storage, []).append(value.id)
            self.family.setdefault(self.root[value.id].id, []).append(value.id)

    def _add(self, op: Op) -> None:
        for value in op.results:
            # A view op that had to copy makes a storage of its own.
            if op.kind is Kind.VIEW and op.inputs and value.storage == op.inputs[0].storage:
                self.view_op[value.id] = op
                self.root[value.id] = root = self.root[op.inputs[0].id]
                if root.id in self.inputs:
                    self._absolute.add(value.id)
            else:
                self.maker[value.id] = op
                self.root[value.id] = value
        for before, after in op.rewritten:
            self.before[after.id] = before
            self.root[after.id] = self.root[before.id]
            if before.id in self._absolute:
                self._absolute.add(after.id)

    def place(self, value: Value) -> Place:
        """Where the first element of a value is, relative to its root.

        A region is known without the offset at which an input begins; the offset of a view of an input is its real one, from
        the start of the memory, and part of what the region is.
        """
        root = self.root[value.id]
        if value.id in self._absolute:
            return Place(root.id, True, start_of(value.type))
        if root.id in self.inputs:
            return Place(root.id, False, 0)
        return Place(root.id, False, start_of(value.type) - start_of(root.type))


def start_of(type_: TensorType) -> int:
    """Bytes before the first element."""
    return type_.offset * type_.dtype.itemsize
