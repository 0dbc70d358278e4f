"""The dimensions that a kernel's ops have in common.

Ops of one kernel may see the same elements under different shapes: [4, 6], its transpose [6, 4], its flattening [24]. The
kernel's domain is cut into factors (here 4 and 6), and each shape is said as a tuple of factors per dimension: ((a,), (b,)),
((b,), (a,)), ((a, b),). A view that cuts a dimension in two splits the factor for all of them.
"""

import math
from collections.abc import Sequence

from kitsune.ir import TensorType

# The factors of each dimension of a shape, outermost first; none for a dimension of size 1.
Layout = tuple[tuple[int, ...], ...]


class Factors:
    """The sizes of a group's factors, by number, and the splits made since a layout was written down."""

    __slots__ = ("parts", "sizes")

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}
        self.parts: dict[int, tuple[int, int]] = {}

    def copy(self) -> "Factors":
        """An independent copy."""
        twin = Factors()
        twin.sizes, twin.parts = self.sizes.copy(), self.parts.copy()
        return twin

    def new(self, size: int) -> int:
        """A new factor."""
        number = len(self.sizes) + len(self.parts)
        self.sizes[number] = size
        return number

    def split(self, factor: int, inner: int) -> tuple[int, int]:
        """Cut a factor into an outer and an inner one of size `inner`, which divides it."""
        outer = self.sizes.pop(factor) // inner
        self.parts[factor] = (-1, -1)  # keeps the numbers of `new` distinct
        self.parts[factor] = pair = (self.new(outer), self.new(inner))
        return pair

    def now(self, layout: Layout) -> Layout:
        """A layout in today's factors."""
        return tuple(tuple(self._parts_of(dim)) for dim in layout) if self.parts else layout

    def _parts_of(self, dim: tuple[int, ...]) -> list[int]:
        found: list[int] = []
        for factor in dim:
            if factor in self.parts:
                found += self._parts_of(self.parts[factor])
            else:
                found.append(factor)
        return found

    def shape(self, layout: Layout) -> tuple[int, ...]:
        """The shape that a layout stands for."""
        return tuple(math.prod(self.sizes[f] for f in dim) for dim in layout)

    def strides(self, type_: TensorType, layout: Layout) -> dict[int, int]:
        """The stride of a tensor along each factor, where its last dimensions are laid out so; a size of 1 is broadcast."""
        found: dict[int, int] = {}
        shape, stride = type_.shape, type_.stride
        missing = len(layout) - len(shape)
        for d, dim in enumerate(layout):
            step = stride[d - missing] if d >= missing and shape[d - missing] != 1 else 0
            for factor in reversed(dim):
                found[factor] = step
                step *= self.sizes[factor]
        return found

    def layout_of_view(self, base: dict[int, int], shape: Sequence[int], strides: Sequence[int]) -> Layout | None:
        """The layout of a view of a tensor with strides `base` along the factors; may split factors. None if not one to one."""
        free = {stride: factor for factor, stride in base.items() if stride}
        layout: list[tuple[int, ...]] = [()] * len(shape)
        # From the innermost out: what a dimension leaves of a factor is found under its stride by the next one.
        for d in sorted(range(len(layout)), key=lambda d: strides[d]):
            dim = self._factors_along(free, shape[d], strides[d])
            if dim is None:
                return None
            layout[d] = dim
        return None if free else self.now(tuple(layout))

    def _factors_along(self, free: dict[int, int], n: int, stride: int) -> tuple[int, ...] | None:
        """The factors that a dimension of size n runs over, taken out of `free`; may split the last one."""
        dim: list[int] = []
        while n > 1:
            factor = free.pop(stride, None)
            if factor is None:
                return None
            size = self.sizes[factor]
            if size > n:
                if size % n:
                    return None
                outer, factor = self.split(factor, n)
                free[stride * n] = outer
                size = n
            elif n % size:
                return None
            dim.insert(0, factor)
            n //= size
            stride *= size
        return tuple(dim)
