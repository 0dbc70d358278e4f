"""Patterns by name: `FusionPattern` says which operators in a row belong together, `FusionDetector` finds them."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from kitsune.accepts import nearest
from kitsune.ir import Graph, Kind, Op


class FusionType(str, enum.Enum):
    """The families that a pattern may name; a plain string with one of these values serves as well."""

    ELEMENTWISE = "elementwise"
    REDUCTION = "reduction"
    MATMUL = "matmul"
    ATTENTION = "attention"
    CUSTOM = "custom"


ELEMENTWISE = (
    "relu relu6 gelu sigmoid tanh silu elu leaky_relu softplus hardswish hardsigmoid mish selu celu hardtanh "
    "exp log sqrt rsqrt abs neg square reciprocal sin cos erf clamp pow add sub mul div maximum minimum where dropout "
    "bias scale affine".split()
)
REDUCTION = "mean sum max min amax amin var std softmax log_softmax layer_norm rms_norm group_norm batch_norm norm logsumexp"
MATMUL = "linear matmul mm bmm addmm baddbmm"
# The family of each operator that a pattern, or a list given to `FusionEngine.fuse`, may name.
FAMILIES: Mapping[str, FusionType] = {
    **dict.fromkeys(ELEMENTWISE, FusionType.ELEMENTWISE),
    **dict.fromkeys(REDUCTION.split(), FusionType.REDUCTION),
    **dict.fromkeys(MATMUL.split(), FusionType.MATMUL),
}
# The aten operators behind a name, where they have others than the name itself, with `_` or `native_` before or `_` behind it.
ATEN: Mapping[str, tuple[str, ...]] = {
    "linear": ("addmm", "mm", "bmm", "linear"),
    "matmul": ("mm", "bmm", "addmm", "baddbmm", "mv", "dot"),
    "hardtanh": ("hardtanh", "clamp"),
    "relu6": ("hardtanh", "clamp"),
    "max": ("max", "amax"),
    "min": ("min", "amin"),
    "bias": ("add",),
    "scale": ("mul",),
    "square": ("pow",),
    "affine": ("addcmul", "mul", "add"),
    "norm": ("linalg_vector_norm", "norm"),
    "batch_norm": ("native_batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit"),
    "rms_norm": ("_fused_rms_norm",),
    # On a CPU dropout is a product with random numbers.
    "dropout": ("native_dropout", "mul"),
}


def checked_ops(ops: object, what: str) -> tuple[str, ...]:
    """A list of operator names, or an error that names the first that is none and the nearest known one."""
    if isinstance(ops, str) or not isinstance(ops, Sequence) or not all(isinstance(op, str) for op in ops):
        raise TypeError(f"{what} is a list of operator names such as ['linear', 'relu'], not {ops!r}.")
    for op in ops:
        if op not in FAMILIES:
            raise ValueError(f"{what} names {op!r}, which is no operator that Kitsune knows.{nearest(op, FAMILIES)}")
    return tuple(ops)


@dataclass(frozen=True)
class FusionPattern:
    """Operators that follow on each other, each reading what the one before has made.

    `ops` are names such as 'linear', 'relu', 'softmax'. `fusion_type` is a label, one of `FusionType` or its text; with
    'attention', ['matmul', 'softmax', 'matmul'] becomes one call of the library's attention. A pattern that is registered with
    an engine is matched whatever the switches of its `FusionConfig` say, which are for the patterns that are built in.
    """

    name: str
    ops: Sequence[str]
    fusion_type: str | FusionType = FusionType.CUSTOM

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"name={self.name!r} is not possible: a pattern's name is a text, such as 'bias_relu'.")
        ops = checked_ops(self.ops, f"The pattern {self.name!r}")
        if len(ops) < 2:
            raise ValueError(f"The pattern {self.name!r} has {len(ops)} operators: it takes two or more to fuse.")
        # A list stays a list for whoever reads it; equality and hashing go by the tuple.
        object.__setattr__(self, "ops", ops)
        object.__setattr__(self, "fusion_type", _fusion_type(self.fusion_type))

    @property
    def is_attention(self) -> bool:
        """Is this the product, softmax, product that the library has one kernel for?"""
        return self.fusion_type is FusionType.ATTENTION and tuple(self.ops) == ("matmul", "softmax", "matmul")


def _fusion_type(given: object) -> FusionType:
    names = [one.value for one in FusionType]
    if isinstance(given, str) and given in names:
        return FusionType(given)
    hint = nearest(given, names) if isinstance(given, str) else ""
    raise ValueError(f"fusion_type={given!r} is not possible: fusion_type accepts {', '.join(map(repr, names))}.{hint}")


# A long chain is matched by the longest pattern that fits; what matches none is grouped by family.
BUILT_IN = (
    FusionPattern("matmul_bias_gelu", ("matmul", "bias", "gelu"), "matmul"),
    FusionPattern("matmul_bias_relu", ("matmul", "bias", "relu"), "matmul"),
    FusionPattern("linear_relu", ("linear", "relu"), "matmul"),
    FusionPattern("linear_gelu", ("linear", "gelu"), "matmul"),
    FusionPattern("linear_silu", ("linear", "silu"), "matmul"),
)


@dataclass(frozen=True)
class Match:
    """Where a pattern was found: the numbers of its operators in the list or the graph."""

    pattern: FusionPattern
    numbers: tuple[int, ...]


class FusionDetector:
    """Finds patterns in a list of operator names, or in a recorded `Graph`, where each op reads the one before."""

    def __init__(self, patterns: Iterable[FusionPattern] = BUILT_IN) -> None:
        # The first that fits wins: longer ones first.
        self.patterns: list[FusionPattern] = []
        for pattern in patterns:
            self.add(pattern)

    def add(self, pattern: FusionPattern) -> None:
        """Look for one more pattern."""
        if not isinstance(pattern, FusionPattern):
            raise TypeError(f"A detector takes a kitsune.fusion.FusionPattern, not {pattern!r}.")
        self.patterns = sorted([*self.patterns, pattern], key=lambda one: -len(one.ops))

    def detect(self, operations: Sequence[str] | Graph) -> list[Match]:
        """The patterns found, in order and without overlap."""
        if isinstance(operations, Graph):
            return self._detect(len(operations.ops), lambda pattern, start: _walk(operations, pattern, start))
        names = checked_ops(operations, "operations")
        return self._detect(len(names), lambda pattern, start: _slice(names, pattern, start))

    def _detect(self, n: int, match: Callable[[FusionPattern, int], tuple[int, ...] | None]) -> list[Match]:
        found: list[Match] = []
        taken: set[int] = set()
        for start in range(n):
            for pattern in self.patterns:
                numbers = match(pattern, start) if start not in taken else None
                if numbers is not None and taken.isdisjoint(numbers):
                    found.append(Match(pattern, numbers))
                    taken.update(numbers)
        return found


def _slice(names: Sequence[str], pattern: FusionPattern, start: int) -> tuple[int, ...] | None:
    end = start + len(pattern.ops)
    return tuple(range(start, end)) if tuple(names[start:end]) == tuple(pattern.ops) else None


def _walk(graph: Graph, pattern: FusionPattern, start: int) -> tuple[int, ...] | None:
    """Follow the data from one op to the next; views in between have the same storage and do not count."""
    numbers: list[int] = []
    for name in pattern.ops:
        number: int | None = start if not numbers else _reader(graph, numbers[-1], name)
        if number is None or not _is(graph.ops[number], name):
            return None
        numbers.append(number)
    return tuple(numbers)


def _reader(graph: Graph, number: int, name: str) -> int | None:
    """The first op that reads a result of another one and goes by this name."""
    made = {value.storage for value in graph.ops[number].outputs}
    for k in range(number + 1, len(graph.ops)):
        op = graph.ops[k]
        if _is(op, name) and any(value.storage in made for value in op.inputs):
            return k
    return None


def _is(op: Op, name: str) -> bool:
    if op.kind is Kind.VIEW:
        return False
    words = ATEN.get(name, (name,))
    called: str = op.target._opname
    return called.strip("_").removeprefix("native_") in {word.strip("_").removeprefix("native_") for word in words}
