"""Kernels over windows of an image: pooling by the largest, and its backward.

An element of the result reads neighbours in the image, so its place is taken apart in all four dimensions. They come in the order
in which the result lies in memory.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from kitsune.codegen.body import Body, Named
from kitsune.codegen.dtypes import HALF, cast
from kitsune.codegen.machine_code import INDEX
from kitsune.codegen.walks import coordinates
from kitsune.ir.graph import Kind, Op, Value
from kitsune.ir.plan import Kernel, Local, window_order
from kitsune.ir.program import Scalar, Size, Stride
from kitsune.ir.reductions import named

aten = torch.ops.aten


def is_window(kernel: Kernel) -> bool:
    """Is it over windows?"""
    return kernel.steps[0].op.kind is Kind.WINDOW


def geometry(op: Op) -> tuple[tuple[int, ...], ...]:
    """Size, stride and padding of an op's windows, down and across."""
    arguments = named(op)
    size = _pair(arguments["kernel_size"])
    return size, _pair(arguments["stride"]) or size, _pair(arguments["padding"])


def window_key(kernel: Kernel) -> tuple[Any, ...]:
    """Equal for two kernels over windows exactly if their texts are."""
    op = kernel.steps[0].op
    accesses = (*kernel.loads, *(store.access for store in kernel.stores))
    forms = tuple((a.value.type.dtype, tuple(s == 1 for s in a.strides)) for a in accesses)
    stored = tuple(store.source for store in kernel.stores)
    return (op.target, geometry(op), window_order(op.outputs[0].type), len(kernel.loads), forms, stored)


def _pair(numbers: Any) -> tuple[int, ...]:
    return tuple(numbers) * 2 if len(numbers) == 1 else tuple(numbers)


@dataclass(slots=True)
class Windows(Body):
    """A kernel over windows, by one index. `at` has, for each dimension of the tensor, its position in the domain."""

    blocks: ClassVar[str] = "BLOCK: tl.constexpr"
    places: ClassVar[tuple[str, ...]] = ("index = block * BLOCK + tl.arange(0, BLOCK)", "inside = index < n")

    at: dict[int, int] = field(default_factory=dict)

    @property
    def extents(self) -> list[Named]:
        """The number of elements."""
        return [Named("n", INDEX, Size())]

    def write(self) -> None:
        """Coordinates, the window, and stores."""
        self.multiples.add("n")
        op = self.kernel.steps[0].op
        self.at = {dim: position for position, dim in enumerate(window_order(op.outputs[0].type))}
        for i, access in enumerate((*self.kernel.loads, *(store.access for store in self.kernel.stores))):
            self.multiples.add(self.pointer(i, access.value.type.dtype))
        self.lines += coordinates("index", "i", "r", {0, 1, 2, 3}, 4, self._size)
        (self._forward if op.target is aten.max_pool2d_with_indices.default else self._backward)(op)
        for i in range(len(self.kernel.stores)):
            self.lines.append(f"tl.store(out{i} + index, {self.stored(i)}, mask=inside)")

    def _size(self, position: int) -> str:
        return self.size(f"size{position}", Size(position, position == 3))

    def _forward(self, op: Op) -> None:
        """The largest, or the last NaN, and where it is; the first place of all where nothing is above minus infinity."""
        size, stride, padding = geometry(op)
        inside, wide = self._bounds(self.kernel.loads[0].value)
        self.lines += ["top = tl.full([BLOCK], float('-inf'), tl.float32)", "at = tl.full([BLOCK], -1, tl.int32)"]
        for down in range(size[0]):
            self.say("y", _shifted(f"i{self.at[2]} * {stride[0]}", down - padding[0]))
            for across in range(size[1]):
                self.say("x", _shifted(f"i{self.at[3]} * {stride[1]}", across - padding[1]))
                self.say("there", inside)
                self._load("found", 0, "float('-inf')")
                self.say("better", "there & ((found > top) | (found != found) | (at < 0))")
                self.say("top", "tl.where(better, found, top)")
                self.say("at", f"tl.where(better, (y * {wide} + x).to(tl.int32), at)")
        self.say("place", "at.to(tl.int64)")
        self.locals = {Local(0, 0): "top", Local(0, 1): "place"}

    def _backward(self, op: Op) -> None:
        """The gradients of those windows that had their largest here, in the order of the windows."""
        size, stride, padding = geometry(op)
        inside, _ = self._bounds(self.kernel.loads[0].value)
        self.say("here", f"i{self.at[2]} * {self._size(self.at[3])} + i{self.at[3]}")
        self.lines.append("total = tl.full([BLOCK], 0.0, tl.float32)")
        for down in range(-(-size[0] // stride[0]) - 1, -1, -1):
            self.say("y", _shifted(f"(i{self.at[2]} + {padding[0]}) // {stride[0]}", -down))
            for across in range(-(-size[1] // stride[1]) - 1, -1, -1):
                self.say("x", _shifted(f"(i{self.at[3]} + {padding[1]}) // {stride[1]}", -across))
                # Windows before the last that begins here may end before.
                over = f" & (i{self.at[2]} + {padding[0]} - y * {stride[0]} < {size[0]})" if down else ""
                over += f" & (i{self.at[3]} + {padding[1]} - x * {stride[1]} < {size[1]})" if across else ""
                self.say("there", inside + over)
                self._load("found", 0, "0.0")
                self._load("place", 1, "-1")
                self.say("total", "total + tl.where(place == here, found, 0.0)")
        self.say("rounded", cast("total", torch.float32, op.results[0].type.dtype, self.used))
        self.locals = {Local(0, 0): "rounded"}

    def _bounds(self, value: Value) -> tuple[str, str]:
        """Whether row y and column x are in an operand, whose sizes are not the domain's; and its width."""
        for name, size in zip(("height", "width"), value.type.shape[2:], strict=True):
            self.say(name, f"{self.scalar(Scalar(size, 'i64'))}.to(tl.int32)")
        return "inside & (y >= 0) & (y < height) & (x >= 0) & (x < width)", "width"

    def _load(self, name: str, index: int, other: str) -> None:
        """An operand's element in row y and column x."""
        places = (f"i{self.at[0]}", f"i{self.at[1]}", "y", "x")
        offset = " + ".join(self._along(index, dim, place) for dim, place in enumerate(places))
        text = f"tl.load(in{index} + {offset}, mask=there, other={other})"
        self.say(name, f"{text}.to(tl.float32)" if self.kernel.loads[index].value.type.dtype in HALF else text)

    def _along(self, index: int, dim: int, place: str) -> str:
        position, strides = self.at[dim], self.kernel.loads[index].strides
        if strides[position] == 1:
            return place
        return f"{place} * {self.size(f'in{index}_stride{position}', Stride(index, position, strides[-1] == 1))}"


def _shifted(text: str, by: int) -> str:
    return f"{text} {'+' if by > 0 else '-'} {abs(by)}" if by else text
