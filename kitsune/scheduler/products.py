"""Which matrix products could be made on larger matrices, which pay, and what each needs for it."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from kitsune.ir import Graph, Kind, Op, Value
from kitsune.scheduler.cost import Costs
from kitsune.scheduler.rewriting import BY_PLACE

HALF = {torch.float16, torch.bfloat16}
# Elements of 16 bits in what is read at once.
VECTOR = 8
# The matrices of a product, as positions among its arguments; their dimensions are (m, k) and (k, n).
OPERANDS = {"mm": (0, 1), "addmm": (1, 2)}
NAMES = (("m", "k"), ("k", "n"))


@dataclass(frozen=True, slots=True)
class Wide:
    """A matrix that a product wants larger: the value whose memory it is, maybe `turned`, and which of that one's dimensions
    grow."""

    root: Value
    rows: bool
    columns: bool
    turned: bool = False


@dataclass(slots=True)
class Product:
    """A product that is made larger: which of m, n and k grow, and what it needs of each argument, by position."""

    op: Op
    grow: frozenset[str]
    wide: dict[int, Wide] = field(default_factory=dict)

    def names(self, position: int) -> tuple[str, str]:
        """The dimensions of the matrix that is argument number `position`."""
        return NAMES[OPERANDS[self.op.target._opname].index(position)]


class Products:
    """The products of a graph. `why_not_fused` tells whether a kernel of ours makes a value."""

    def __init__(self, graph: Graph, why_not_fused: Callable[[Op], str | None]) -> None:
        self.graph, self.why_not_fused = graph, why_not_fused
        self._maker = {v.id: op for op in graph.ops for v in op.results}
        self._written = {storage for op in graph.ops for storage in op.effects.writes}
        self._returned = {v.storage for v in graph.outputs}

    def chosen(self, costs: Costs) -> dict[int, Product]:
        """Those for which it pays, by the number of their op."""
        found = {}
        for number, op in enumerate(self.graph.ops):
            if op.kind is Kind.GEMM and costs.worth_padding(op):
                product = self.candidate(op)
                if isinstance(product, Product):
                    found[number] = product
        users = Counter(wide.root.id for product in found.values() for wide in product.wide.values())
        return {
            n: product
            for n, product in found.items()
            if costs.padding(product.op, self._moved(product, users), len(product.wide))
        }

    def candidate(self, op: Op) -> Product | str:
        """What a product needs to be made larger, or why it cannot be."""
        if (reason := _why_not_plain(op)) is not None:
            return reason
        product = Product(op, odd_dimensions(op))
        if not product.grow:
            return "its dimensions are multiples of 8"
        for position in OPERANDS[op.target._opname]:
            grows = [name in product.grow for name in product.names(position)]
            if any(grows):
                wide = _wide(op.args[position], self._root(op.args[position]), *grows)
                if isinstance(wide, str):
                    return wide
                product.wide[position] = wide
        if op.target._opname == "addmm" and "n" in product.grow:
            bias = op.args[0]
            if len(bias.type.shape) != 1 or self._root(bias).type is not bias.type:
                return "what it adds is no row of its own"
            product.wide[0] = Wide(self._root(bias), False, True)
        if any(wide.root.storage in self._written for wide in product.wide.values()):
            return "an operand is written by another operator"
        return product

    def _root(self, value: Value) -> Value:
        """What a value is a view of, which it may be all of."""
        while (op := self._maker.get(value.id)) is not None and op.kind is Kind.VIEW and op.inputs[0].storage == value.storage:
            if op.target in BY_PLACE:
                # An input begins where nobody knows, so that offset 0 need not be its own.
                break
            value = op.inputs[0]
        return value

    def _moved(self, product: Product, users: Counter[int]) -> float:
        """Bytes that are moved for a product and for nothing else: operands that no kernel makes, a result that is returned.

        What several products use counts for each in part.
        """
        (result,) = product.op.results
        nbytes = 0.0
        if result.storage in self._returned and not product.grow.isdisjoint("mn"):
            nbytes += result.type.nbytes
        for root in (wide.root for wide in product.wide.values()):
            op = self._maker.get(root.id)
            if op is None or op.kind is not Kind.POINTWISE or self.why_not_fused(op) is not None:
                nbytes += root.type.nbytes / users[root.id]
        return 2 * nbytes


def odd_dimensions(op: Op) -> frozenset[str]:
    """Which of a product's dimensions m, n and k keep the library from reading and writing 16 bytes at a time."""
    found = {"n": op.results[0].type.shape[1]}
    for position, (rows, columns) in zip(OPERANDS[op.target._opname], NAMES, strict=True):
        type_ = op.args[position].type
        if type_.stride[1] == 1:
            found[columns] = type_.shape[1]
        else:
            found[rows] = type_.shape[0]
    return frozenset(name for name, size in found.items() if size % VECTOR)


def _why_not_plain(op: Op) -> str | None:
    if op.target._opname not in OPERANDS or op.target._overloadname != "default":
        return "it is no product of two matrices"
    (result,) = op.results
    if result.type.dtype not in HALF or not result.type.canonical or not result.type.nbytes:
        return "it is not in 16 bits"
    operands = [op.args[position].type for position in OPERANDS[op.target._opname]]
    if any(1 not in t.stride or not t.nbytes or t.conj or t.neg for t in operands):
        return "the library copies its operands"
    return None


def _wide(matrix: Value, root: Value, rows: bool, columns: bool) -> Wide | str:
    """Where a matrix is all of another value, maybe transposed, the dimensions of that one that grow."""
    type_, of = matrix.type, root.type
    whole = of.canonical and len(of.shape) >= 2 and type_.shape.numel() == of.shape.numel() and type_.offset == of.offset
    straight = whole and type_.stride == (of.shape[-1], 1) and type_.shape[1] == of.shape[-1]
    turned = whole and type_.stride == (1, of.shape[-1]) and type_.shape[0] == of.shape[-1]
    if not straight and not turned:
        return "an operand is a part of another tensor"
    grows_first, grows_last = (rows, columns) if straight else (columns, rows)
    if grows_first and len(of.shape) != 2:
        return "an operand would need more rows than one of its views has"
    return Wide(root, grows_first, grows_last, not straight)
