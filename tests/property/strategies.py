"""Random programs. Hypothesis draws small integers; each step of the table makes a line of Python of three."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from random import Random
from typing import Any

import torch
from hypothesis import strategies as st

from tests._compare import history
from tests.property.world import Program, World

Step = Callable[["Builder", int, int, int], str]
STEPS: dict[str, Step] = {}
MOST_TENSORS = 14

SHAPES = ("2, 3", "3", "3, 3", "2, 1", "1", "2, 2, 3", "", "0, 3")
DTYPES = ("float32", "float32", "float32", "float64", "int64", "bool")
SCALARS = ("2", "-1.5", "0.1", "True", "3")
UNARY = ("neg", "exp", "tanh", "sigmoid", "relu", "abs", "sin", "sqrt", "sign", "reciprocal", "logical_not", "clone")
BINARY = ("add", "sub", "mul", "div", "maximum", "minimum", "atan2", "eq", "lt", "remainder", "logical_and", "pow")
# No prod: its derivative has another formula, a bit off, for every wrapper and under every dispatch mode.
REDUCTIONS = ("sum", "mean", "amax", "amin", "var", "argmax", "any", "logsumexp", "cumsum", "softmax")


def step(weight: int = 1, table: dict[str, Step] = STEPS) -> Callable[[Step], Step]:
    """Put a step into the table, as often as its weight says."""

    def put(function: Step) -> Step:
        for i in range(weight):
            table[f"{function.__name__}{i or ''}"] = function
        return function

    return put


class Builder:
    """Runs each line in eager as it is made, so that the next one can fit."""

    def __init__(self) -> None:
        self.world = World(gradients=[])
        self.program = Program()
        self.count = 0

    def new(self) -> str:
        self.count += 1
        return f"t{self.count}"

    def any(self, i: int) -> str:
        """A living tensor's name."""
        names = list(self.world.tensors)
        return names[i % len(names)]

    def leaf(self, i: int) -> str:
        """A leaf that requires grad; any tensor if there is none, and the line will fail alike everywhere."""
        names = [name for name, t in self.world.tensors.items() if t.requires_grad and history(t) == "leaf"]
        return names[i % len(names)] if names else self.any(i)

    def graded(self, i: int) -> str:
        """A tensor with a graph behind it, or any."""
        names = [name for name, t in self.world.tensors.items() if history(t) != "leaf"]
        return names[i % len(names)] if names else self.any(i)

    def fitting(self, i: int, name: str) -> str:
        """A tensor that broadcasts with the named one (an unfitting one now and then)."""
        shape = self.world.tensors[name].shape
        names = [n for n, t in self.world.tensors.items() if _broadcasts(t.shape, shape) or i % 29 == 28]
        return names[i % len(names)]

    def alike(self, i: int, name: str) -> str:
        """A tensor of the named one's dtype that does not overlap itself, so that a write to it works."""
        dtype = self.world.tensors[name].dtype
        names = [n for n, t in self.world.tensors.items() if t.dtype is dtype and 0 not in t.stride()]
        return names[i % len(names)] if names else name

    def is_shared(self, name: str) -> bool:
        """Does NumPy share a tensor's memory, so that torch may not resize it?"""
        tensor = self.world.tensors.get(name)
        return tensor is not None and not tensor.untyped_storage().resizable()

    def is_trained(self, name: str) -> bool:
        """Is a tensor an optimizer's?"""
        optimizers = [value for value in self.world.names.values() if isinstance(value, torch.optim.Optimizer)]
        trained = [parameter for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]]
        return any(parameter is self.world.tensors.get(name) for parameter in trained)

    def optimizer(self, i: int) -> str | None:
        names = [name for name, value in self.world.names.items() if isinstance(value, torch.optim.Optimizer)]
        return names[i % len(names)] if names else None

    def dim(self, name: str, k: int) -> int:
        rank = self.world.tensors[name].dim()
        return k % rank - (rank if k % 2 else 0) if rank else 0

    def size(self, name: str, dim: int) -> int:
        shape = self.world.tensors[name].shape
        return shape[dim] if shape else 1

    def add(self, line: str, where: list[str]) -> None:
        # Where torch may not resize what is to be written, it says so when the tensor is larger than its memory already, and
        # whatever touches that tensor afterwards reads or writes what belongs to others.
        if any(self.is_shared(name) or self.is_trained(name) for name in re.findall(r"out=(\w+)", line)):
            line = "pass"
        # Nor does a fused optimizer look whether its state is as large as the parameter.
        for name, other in re.findall(r"(\w+)(?:\.data = |\.set_\()(\w+)", line):
            new = self.world.tensors.get(other)
            if self.is_trained(name) and new is not None and self.world.tensors[name].shape != new.shape:
                line = "pass"
        where.append(line)
        self.world.execute(line)


def _broadcasts(a: torch.Size, b: torch.Size) -> bool:
    return all(x == y or 1 in (x, y) for x, y in zip(reversed(a), reversed(b), strict=False))


def pick(options: tuple[str, ...], k: int) -> str:
    return options[k % len(options)]


def make(shape: str, k: int, dtype: str, grad: bool = False) -> str:
    """A tensor of known, varied values, without touching the generator."""
    values = f"torch.arange(torch.Size([{shape}]).numel(), dtype=torch.float64)"
    line = f"({values} * 0.37 + {k % 7} * 0.61).sin().mul(3).view([{shape}]).to(torch.{dtype})"
    return f"{line}.requires_grad_()" if grad else line


@st.composite
def programs(draw: Any, steps: int = 30, table: dict[str, Step] = STEPS, begin: Any = None) -> Program:
    """A program of steps from the table that eager has run once, exceptions included; `begin` makes its first tensors.

    A step is one drawn number, scattered: hypothesis likes small and equal numbers, and four of those for each step made
    programs so much alike that 400 of them missed a bug that 5 % of scattered ones have.
    """
    builder = Builder()
    names = sorted(table)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            (begin or start)(builder, draw(st.integers(0, 255)))
            for number in draw(st.lists(st.integers(0, 2**32 - 1), min_size=8, max_size=steps)):
                scattered = Random(number)
                name, (i, j, k) = scattered.choice(names), (scattered.randrange(256) for _ in range(3))
                line = table[name](builder, i, j, k)
                if len(builder.world.tensors) > MOST_TENSORS:
                    line += f"; del {builder.any(i + j)}"
                builder.add(line, builder.program.inside)
        finally:
            torch.set_grad_enabled(True)
    return builder.program


def start(builder: Builder, k: int) -> None:
    """Parameters and data made outside the context, and one op inside it."""
    outside, inside = builder.program.outside, builder.program.inside
    builder.add(f"{builder.new()} = {make('3, 3', k, 'float32', grad=True)}", outside)
    builder.add(f"{builder.new()} = {make('3', k + 1, 'float32', grad=True)}", outside)
    builder.add(f"{builder.new()} = {make('2, 3', k + 2, 'float32')}", outside)
    builder.add(f"{builder.new()} = torch.zeros(2, 3)", outside)
    builder.add(f"{builder.new()} = F.linear(t3, t1, t2)", inside)
