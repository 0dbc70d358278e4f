"""Matrix products in 16 bits with an odd dimension, made on matrices that are a little larger.

A library's fast kernels read 16 bytes at a time, so they want rows of a multiple of 8 elements. An operand is written into
memory that has room for more rows or columns, which are zero, by the kernel that makes it anyway; the product is made with the
larger size, and its result is the part of it that was asked for.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from kitsune.ir import Graph, Kind, Op, Value
from kitsune.scheduler.cost import Costs
from kitsune.scheduler.formats import with_shape
from kitsune.scheduler.products import VECTOR, Product, Products, Wide
from kitsune.scheduler.rewriting import Rewriting, Stuck

aten = torch.ops.aten
# Where it adds next to nothing, whole cache lines: 3 % faster than 8 on an H200 (benchmarks/bench_padding.py).
LINE, LINE_SHARE = 64, 0.01


def padded(n: int) -> int:
    """The size that a dimension of n elements gets."""
    line = -(-n // LINE) * LINE
    return line if line - n <= LINE_SHARE * n else -(-n // VECTOR) * VECTOR


def padded_products(graph: Graph, costs: Costs, why_not_fused: Callable[[Op], str | None]) -> Graph:
    """The graph with those products made larger for which it pays."""
    products = Products(graph, why_not_fused).chosen(costs)
    if not products:
        return graph
    try:
        return _Padding(graph, products).rewritten()
    except Stuck:
        return graph


class _Padding(Rewriting):
    """The graph on its way. `wide` has the larger memory of each root, by number."""

    def __init__(self, graph: Graph, products: dict[int, Product]) -> None:
        super().__init__(graph)
        self.products = products
        self.wide: dict[int, Value] = {}
        self.wanted: dict[int, Wide] = {}
        for wide in (wide for product in products.values() for wide in product.wide.values()):
            known = self.wanted.get(wide.root.id, wide)
            self.wanted[wide.root.id] = Wide(wide.root, known.rows or wide.rows, known.columns or wide.columns)

    def rewritten(self) -> Graph:
        """Raises Stuck."""
        for value in self.graph.inputs:
            self._widen(value)
        for number, op in enumerate(self.graph.ops):
            if number in self.products:
                self._product(self.products[number])
            else:
                self.follow(op)
            for value in op.results:
                self._widen(value)
        return self.graph_now()

    def _widen(self, value: Value) -> None:
        """Put a value into larger memory, if a product wants it so; others read it there, too."""
        wanted = self.wanted.get(value.id)
        if wanted is None:
            return
        shape = list(value.type.shape)
        grown = [(0, shape[0])] if wanted.rows else []
        grown += [(len(shape) - 1, shape[-1])] if wanted.columns else []
        for dim, n in grown:
            shape[dim] = padded(n)
        memory = part = self.wide[value.id] = self.memory(with_shape(value.type, torch.Size(shape)))
        for dim, n in grown:
            part = self.view(aten.slice.Tensor, part, dim, 0, n)
        source = self.stands(value)
        self.now[value.id] = self.write(aten.copy_.default, part, source)
        if source is value:
            self.plain[value.id] = value
        # After the copy, and so not before there is anything to copy: the memory is in use from then on.
        for dim, n in grown:
            self.write(aten.zero_.default, self.view(aten.slice.Tensor, memory, dim, n, shape[dim]))

    def _product(self, product: Product) -> None:
        op, grow = product.op, product.grow
        args = list(op.args)
        for position, argument in enumerate(args):
            if position in product.wide:
                args[position] = self._larger(argument, product, position)
            elif isinstance(argument, Value):
                args[position] = self.stands(argument)
        m, n = op.results[0].type.shape
        shape = (padded(m) if "m" in grow else m, padded(n) if "n" in grow else n)
        self._result(replace(op, args=tuple(args), inputs=tuple(a for a in args if isinstance(a, Value))), shape)

    def _larger(self, matrix: Value, product: Product, position: int) -> Value:
        """An operand as a view of larger memory."""
        wide, type_ = product.wide[position], matrix.type
        memory = self.wide[wide.root.id]
        if len(type_.shape) == 1:
            return memory
        columns = memory.type.shape[-1]
        stride = (1, columns) if wide.turned else (columns, 1)
        names = zip(product.names(position), type_.shape, strict=True)
        shape = tuple(padded(n) if name in product.grow else n for name, n in names)
        return self.view(aten.as_strided.default, memory, shape, stride, 0)

    def _result(self, op: Op, shape: tuple[int, int]) -> None:
        """Add a product, and what was asked for of it under the recorded number."""
        (value,) = op.results
        kept = value.storage in self.seen
        if shape == tuple(value.type.shape):
            self.ops.append(op)
            return
        whole = self.value(with_shape(value.type, torch.Size(shape)), None if kept else value.storage)
        self.ops.append(replace(op, results=(whole,)))
        part = whole
        for dim in (0, 1):
            if shape[dim] != value.type.shape[dim]:
                part = self.view(aten.slice.Tensor, part, dim, 0, value.type.shape[dim])
        if kept:
            self.call(aten.clone.default, Kind.POINTWISE, value, part, memory_format=torch.contiguous_format)
            return
        named = replace(value, type=part.type)
        self.ops[-1] = replace(self.ops[-1], results=(named,))
        self.now[value.id] = named
