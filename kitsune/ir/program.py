"""A kernel's source, what it is called with, and what a block of it works on."""

from dataclasses import dataclass

from kitsune.ir.graph import Slot


@dataclass(frozen=True, slots=True)
class Pointer:
    """A kernel's parameter: the address of the first element of its load or store number `index` (loads first)."""

    index: int


@dataclass(frozen=True, slots=True)
class Size:
    """A kernel's parameter: the size of a dimension of its domain; `dim` None for the number of elements.

    A variant with a divisibility takes multiples of it where it `counts`.
    """

    dim: int | None = None
    counts: bool = True


@dataclass(frozen=True, slots=True)
class Extent:
    """A kernel's parameter: the number of its rows, or of its columns."""

    of_columns: bool
    counts: bool = True


@dataclass(frozen=True, slots=True)
class Stride:
    """A kernel's parameter: the stride of access number `index` along `dim`."""

    index: int
    dim: int
    counts: bool = True


@dataclass(frozen=True, slots=True)
class Scalar:
    """A kernel's parameter: a Python number, moving or constant, as Triton's type `type` (fp32, fp64, i64, i1)."""

    value: Slot | float | int | bool
    type: str


@dataclass(frozen=True, slots=True)
class SlotAddress:
    """A kernel's parameter: where in memory moving number `index` is to be read, as float64."""

    index: int


Parameter = Pointer | Size | Extent | Stride | Scalar | SlotAddress


@dataclass(frozen=True, slots=True)
class Tile:
    """What a block works on at a time: so many rows and columns, by so many warps; elements and 0 where nothing is reduced."""

    rows: int
    columns: int
    warps: int

    def __str__(self) -> str:
        size = f"{self.rows} x {self.columns}" if self.columns else f"{self.rows}"
        return f"{size} by {self.warps} warp{'s' * (self.warps > 1)}"


@dataclass(frozen=True, slots=True)
class Program:
    """A kernel's source and what to call it with, in the order of its parameters.

    `parameters` are of the kernel that it was rendered from: another kernel with the same text has its own.
    """

    name: str
    text: str
    parameters: tuple[Parameter, ...]
    # One launch for many kernels: the parameters of each are a row of a table.
    batched: bool
    # One text is compiled for several.
    tile: Tile


@dataclass(frozen=True, slots=True)
class Written:
    """What was written of the kernels of a launch: their program, and what each kernel after the first passes to it.

    `slots_in_memory`: it reads moving numbers from memory.
    """

    program: Program
    rest: tuple[tuple[Parameter, ...], ...]
    slots_in_memory: bool


class Pending(Exception):
    """A program is still being compiled: what would start it is done in another way meanwhile."""
