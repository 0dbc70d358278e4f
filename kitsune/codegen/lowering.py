"""How one op becomes text: its operands by the names of its schema, cast to what eager would compute in."""

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from kitsune.codegen.dtypes import FLOATING, HALF, LANGUAGE, cast, common_dtype, opmath
from kitsune.codegen.libdevice import writes_erf
from kitsune.ir import Op, Slot, Value, named
from kitsune.ir.program import Scalar


class NotLowered(Exception):
    """Says in a sentence why an op cannot be part of a kernel."""


class Promotion(enum.Enum):
    """Which dtype the operands meet in."""

    COMMON = enum.auto()
    # As COMMON, but integers become the default float.
    FLOAT = enum.auto()
    # That of the first output, whatever the operands are.
    RESULT = enum.auto()


@dataclass(frozen=True, slots=True)
class Rule:
    """A row of the lowering table.

    `lower` returns a text for each of `Op.outputs`. `operands` are the arguments that promote; None for all. `literals` are
    whole numbers that stand in the text as they are, because the text depends on them; so do `floats`, where one of them is
    given for such an argument. `boolean` results need no conversion from the arithmetic's dtype; an `exact` rule returns one of
    its operands, which is of the common dtype already.
    """

    lower: Callable[["Lowering"], str | tuple[str, ...]]
    promotion: Promotion = Promotion.COMMON
    operands: tuple[str, ...] | None = None
    literals: frozenset[str] = frozenset(("alpha",))
    floats: frozenset[float] = frozenset()
    boolean: bool = False
    exact: bool = False


lower_rules: dict[str, Rule] = {}


def base_name(op: Op) -> str:
    """The row of an op: its name without the mark of the in-place and list forms."""
    name = _base_name(op.target._schema.name)
    # With a rounding mode, integers are not promoted.
    if name in ("div", "divide") and any(key == "rounding_mode" and mode is not None for key, mode in op.kwargs):
        return "div.mode"
    return name


@cache
def _base_name(schema: str) -> str:
    name = schema.rpartition("::")[2]
    if name.startswith("_foreach_"):
        name = name.removeprefix("_foreach_")
    return name if name.startswith("__") else name.removesuffix("_") if not name.startswith("_fused") else name


def arguments_of(op: Op) -> dict[str, Any]:
    """The op's arguments by name, defaults filled in; a list with one element counts as that element."""
    bound = named(op)
    for name, value in bound.items():
        if type(value) in (tuple, list):
            bound[name] = value[0] if len(value) == 1 else value or None
    return bound


class Typed(str):
    """The text of a result that is not of the dtype that the rule computes in."""

    __slots__ = ("dtype",)
    dtype: torch.dtype

    def __new__(cls, text: str, dtype: torch.dtype) -> "Typed":
        """The text, and its dtype."""
        typed = super().__new__(cls, text)
        typed.dtype = dtype
        return typed


# Writes a reduction: its kind, the dtype that it is computed in, and its operand; gives the names of its results.
Reduce = Callable[[str, torch.dtype, str], tuple[str, ...]]


@dataclass(slots=True)
class Lowering:
    """An op on its way to text. `registers` are the operands' texts by value number, of the operand's dtype."""

    op: Op
    rule: Rule
    registers: dict[int, str]
    scalar_name: Callable[[Scalar], str]
    let: Callable[[str], str]
    used: set[str] = field(default_factory=set)
    reducer: Reduce | None = None
    # As eager, to 16 bits; else such values stay in float32.
    rounds: bool = True
    arguments: dict[str, Any] = field(init=False)
    common: torch.dtype = field(init=False)

    def __post_init__(self) -> None:
        self.arguments = arguments_of(self.op)
        self.common = self._common()

    def _common(self) -> torch.dtype:
        if self.rule.promotion is Promotion.RESULT:
            return self.op.outputs[0].type.dtype
        operands = self.rule.operands
        chosen = [a for name, a in self.arguments.items() if operands is None or name in operands]
        tensors = [(a.type.dtype, len(a.type.shape)) for a in chosen if type(a) is Value]
        # Other numbers than those declared as operands are parameters of the op, which do not promote.
        numbers = (
            [float if type(a) is Slot else type(a) for a in chosen if type(a) in (Slot, float, int, bool)] if operands else []
        )
        dtype = common_dtype(tensors, numbers)
        if self.rule.promotion is Promotion.FLOAT and not dtype.is_floating_point:
            return torch.get_default_dtype()
        return dtype

    @property
    def compute(self) -> torch.dtype:
        """What eager computes in."""
        return opmath(self.common)

    @property
    def is_float(self) -> bool:
        """Floating-point arithmetic, as opposed to integers and booleans."""
        return self.common in FLOATING

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> str:
        """A tensor operand, cast to the common dtype or to `dtype`."""
        value = self.arguments[name]
        if type(value) is not Value:
            raise NotLowered(f"{name} of {self.op.target} is not a tensor")
        return cast(self.registers[value.id], value.type.dtype, self.kept(dtype or self.common), self.used)

    def kept(self, dtype: torch.dtype) -> torch.dtype:
        """What a tensor of a dtype is in registers."""
        return dtype if self.rounds else opmath(dtype)

    def number(self, name: str, rounded: bool = False, dtype: torch.dtype | None = None) -> str:
        """A Python number as the op computes with it; `rounded` where eager takes it as the tensors' dtype."""
        value = self.arguments[name]
        dtype = dtype or self.common
        if name in self.rule.literals and (type(value) is int or (type(value) is float and value in self.rule.floats)):
            return self.constant(value, dtype)
        if type(value) not in (Slot, float, int, bool):
            raise NotLowered(f"{name} of {self.op.target} is no number that a kernel can take")
        if opmath(dtype) not in FLOATING:
            return self._whole(value, dtype)
        text = self.scalar_name(Scalar(value, "fp64" if dtype is torch.float64 else "fp32"))
        return cast(text, torch.float32, dtype, self.used) if rounded and dtype in HALF else text

    def _whole(self, value: Any, dtype: torch.dtype) -> str:
        if type(value) is Slot:
            raise NotLowered(f"{self.op.target} takes a number that moves, as an integer")
        text = self.scalar_name(Scalar(bool(value) if dtype is torch.bool else int(value), "i64"))
        return text if dtype is torch.int64 else cast(text, torch.int64, dtype, self.used)

    def value(self, name: str, rounded: bool = False) -> str:
        """A tensor or a number."""
        return self.tensor(name) if self.is_tensor(name) else self.number(name, rounded)

    def is_tensor(self, name: str) -> bool:
        """Was a tensor given for this argument?"""
        return type(self.arguments.get(name)) is Value

    def given(self, name: str) -> bool:
        """Was anything given for this argument?"""
        return self.arguments.get(name) is not None

    def constant(self, number: float, dtype: torch.dtype | None = None) -> str:
        """A number that is part of the op's definition."""
        dtype = dtype or self.compute
        if dtype is torch.float64:
            return f"tl.full((), {float(number)!r}, tl.float64)"
        return repr(float(number)) if dtype in FLOATING else repr(int(number))

    def call(self, helper: str, *operands: str) -> str:
        """A call of a device function of this package."""
        self.used.add(helper)
        return f"{helper}({', '.join(operands)})"

    def divide(self, a: str, b: str) -> str:
        """Correctly rounded division; Triton's own `/` of float32 is an approximation."""
        return f"({a} / {b})" if self.compute is torch.float64 else f"tl.div_rn({a}, {b})"

    def reciprocal(self, name: str) -> str:
        """1 / a Python number, divided in float64: 1 / 1.1 is another float32 than 1 / float32(1.1)."""
        value = self.arguments[name]
        if type(value) not in (Slot, float, int, bool):
            raise NotLowered(f"{name} of {self.op.target} is no number that a kernel can take")
        text = self.scalar_name(Scalar(value if type(value) is Slot else float(value), "fp64"))
        return cast(f"({self.constant(1, torch.float64)} / {text})", torch.float64, self.compute, self.used)

    def square_root(self, x: str) -> str:
        """Correctly rounded square root."""
        return f"tl.sqrt({x})" if self.compute is torch.float64 else f"tl.sqrt_rn({x})"

    def fma(self, a: str, b: str, c: str) -> str:
        """a * b + c with one rounding, as nvcc contracts it inside eager's kernel."""
        return f"libdevice.fma({a}, {b}, {c})"

    def erf(self, x: str) -> str:
        """The error function."""
        written = self.compute is torch.float32 and writes_erf()
        return self.call("erf", x) if written else f"libdevice.erf({x})"

    def negative(self, x: str) -> str:
        """-x for floats. Triton subtracts from zero, which makes +0.0 of +0.0."""
        return f"({x} * -1.0)"

    def rounded(self, text: str) -> str:
        """A step of an op that eager computes in the tensors' own dtype."""
        return self.let(cast(text, self.compute, self.kept(self.common), self.used))

    def reduce(self, kind: str, text: str, dtype: torch.dtype | None = None) -> str:
        """The sum, max or min of a row."""
        return self.reduce_to(kind, text, dtype)[0]

    def reduce_to(self, kind: str, text: str, dtype: torch.dtype | None = None) -> tuple[str, ...]:
        """A reduction with several results: "moments" are a row's mean and its sum of squared distances from that, "softmax" its
        maximum and its sum of exp(x - maximum), or of exp(x) where the maximum is infinite: NaN only where x has one."""
        if self.reducer is None:
            raise self.refuse("reduces, in a kernel that does not")
        return self.reducer(kind, dtype or self.compute, text)

    def pick(self, text: str, position: str) -> str:
        """The element of a row at a position, an integer; 0 if that is beyond the row."""
        if self.reducer is None:
            raise self.refuse("picks an element, in a kernel without rows")
        return self.reducer(f"pick {position}", self.compute, text)[0]

    def place(self, text: str, position: str) -> str:
        """A row of zeros but for a number at a position, an int32; of zeros if that is beyond the row."""
        if self.reducer is None:
            raise self.refuse("places an element, in a kernel without rows")
        return self.reducer(f"place {position}", self.compute, text)[0]

    @property
    def count(self) -> str:
        """The number of elements in a row, as a number to compute with."""
        return f"columns.to({LANGUAGE[self.compute]})"

    def refuse(self, reason: str) -> NotLowered:
        """The exception for an op with arguments that no rule covers."""
        return NotLowered(f"{self.op.target} {reason}")
