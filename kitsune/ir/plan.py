"""What is run for a Graph: kernels and library calls in order, each with its stream, and a place for every byte."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from kitsune.ir.graph import Graph, Kind, Op, Value
from kitsune.ir.program import Tile, Written
from kitsune.ir.tensor_type import TensorType


@dataclass(frozen=True, slots=True)
class Access:
    """How a kernel walks over a tensor: `strides` has, for each dimension of the kernel's domain, the distance in elements.

    It starts at the first element of `value`, whose own shape and strides do not matter any more: views, transposes and
    broadcasts (a stride of 0) are folded into these numbers.
    """

    value: Value
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Load:
    """An operand that is read from memory: number `index` of the kernel's loads."""

    index: int


@dataclass(frozen=True, slots=True)
class Local:
    """An operand that is still in a register: output number `output` (of `Op.outputs`) of an earlier step."""

    step: int
    output: int


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """An op inside a kernel. `operands` has an entry for each of `op.inputs`; None where the old content is not read."""

    op: Op
    operands: tuple[Load | Local | None, ...]


@dataclass(frozen=True, slots=True)
class Store:
    """A register that is written to memory."""

    source: Local
    access: Access


@dataclass(frozen=True, slots=True, eq=False)
class Kernel:
    """A group of ops that is run as one kernel, over a domain whose sizes are listed outermost first.

    Every load happens before any store, element by element. `domain` is () for a single element; a size may be 0. The last
    `reduced` dimensions are the elements of a row, which its reductions reduce, where it has any. An access that does not move
    along them is made once for each row. `rounds`: is each step rounded to its dtype, as in eager, or only what is stored?

    With `gathered`, numbers of steps, the first dimension is one that a block goes through in turn: it has the same places of one
    row after the other in hand, and adds up over them what these steps are sums of.
    """

    name: str
    domain: tuple[int, ...]
    loads: tuple[Access, ...]
    steps: tuple[Step, ...]
    stores: tuple[Store, ...]
    reduced: int = 0
    gathered: tuple[int, ...] = ()
    rounds: bool = True

    @property
    def n_elements(self) -> int:
        """Elements of the domain."""
        return math.prod(self.domain)

    @property
    def n_rows(self) -> int:
        """Rows, each of which a reduction makes a single number of; elements where there is none. Rows in turn count once."""
        return math.prod(self.domain[self.first : len(self.domain) - self.reduced])

    @property
    def first(self) -> int:
        """The first dimension of the rows that blocks share among them."""
        return 1 if self.gathered else 0

    @property
    def n_columns(self) -> int:
        """Elements of a row."""
        return math.prod(self.domain[len(self.domain) - self.reduced :])

    @property
    def nbytes(self) -> int:
        """Bytes that it must move: each input read once, each output written once; a broadcast input counts once."""
        return sum(self.touched(access) for access in (*self.loads, *(s.access for s in self.stores)))

    def touched(self, access: Access) -> int:
        """Bytes of the distinct elements that an access reaches: of an operand whose neighbours are read, all."""
        over_windows = self.steps[0].op.kind is Kind.WINDOW
        return access.value.type.nbytes if over_windows else touched_bytes(access, self.domain)


def touched_bytes(access: Access, domain: tuple[int, ...]) -> int:
    """Bytes of the distinct elements that an access reaches."""
    n = access.value.type.dtype.itemsize
    for size, stride in zip(domain, access.strides, strict=True):
        if stride:
            n *= size
    return n if all(domain) else 0


def window_order(type_: TensorType) -> tuple[int, ...]:
    """The dimensions of a kernel over windows: those of its result, as it lies in memory."""
    return tuple(sorted(range(len(type_.shape)), key=lambda d: (-type_.stride[d], d)))


@dataclass(frozen=True, slots=True, eq=False)
class Launch:
    """Kernels that are started together, or a call of the library: exactly one of `kernels` and `op` is there.

    Several kernels in one launch have the same source and no order between them: a horizontal fusion. `waits` are numbers of
    launches on other streams that must have ended before. `host_only` starts nothing. `tile` is what a block of its kernels works
    on, where that is another than the first choice. `written` is its source, where that was written before.
    """

    kernels: tuple[Kernel, ...] = ()
    op: Op | None = None
    stream: int = 0
    waits: tuple[int, ...] = ()
    micros: float = 0.0
    tile: "Tile | None" = None
    written: "Written | None" = None

    @property
    def host_only(self) -> bool:
        """Starts nothing on the device."""
        return self.op is not None and self.op.starts_nothing

    @property
    def is_empty(self) -> bool:
        """Has kernels over no elements only, and is not made."""
        return self.op is None and not any(kernel.n_elements for kernel in self.kernels)

    @property
    def name(self) -> str:
        """What it does, in words of the op table."""
        if self.op is not None:
            return str(self.op.target.overloadpacket).rpartition(".")[2]
        return self.kernels[0].name if len(self.kernels) == 1 else f"{self.kernels[0].name} x {len(self.kernels)}"

    @property
    def nbytes(self) -> int:
        """Bytes that it must move: each operand once, each result once."""
        return self.op.nbytes if self.op is not None else sum(kernel.nbytes for kernel in self.kernels)

    @property
    def ops(self) -> tuple[Op, ...]:
        """The ops that it computes."""
        return (self.op,) if self.op is not None else tuple(step.op for kernel in self.kernels for step in kernel.steps)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why an op was not put into the kernel of the op that it reads, or that reads the same: a sentence."""

    before: str
    op: str
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """A Graph, decided. `offsets` gives each storage that lives and dies inside the plan its first byte in the arena.

    `drops` lists, for each launch, the storages whose last use it is, of those that are not in the arena.
    """

    graph: Graph
    launches: tuple[Launch, ...]
    offsets: Mapping[int, int]
    arena: int
    drops: tuple[tuple[int, ...], ...]
    refusals: tuple[Refusal, ...] = ()
    # Ops recorded, and those of them that would reach the device if each living one were run by itself.
    n_recorded: int = 0
    n_unplanned: int = 0
    # Of the graph that was recorded: ops that nobody needs, and outputs whose numbers the program reads as soon as it can.
    n_dead: int = 0
    awaited: tuple[int, ...] = ()
    # Bytes outside of the arena that are in use at most, of what the plan makes.
    outside: int = 0

    def __str__(self) -> str:
        from kitsune.ir.plan_text import plan_text

        return plan_text(self)

    def with_tiles(self, tile_for: "Callable[[Launch], Tile | None]") -> "Plan":
        """The plan with other tiles for its launches of kernels; itself where it has them."""
        tiles = [tile_for(launch) if launch.kernels else None for launch in self.launches]
        if all(launch.tile == tile for launch, tile in zip(self.launches, tiles, strict=True)):
            return self
        return replace(self, launches=tuple(replace(one, tile=tile) for one, tile in zip(self.launches, tiles, strict=True)))

    @property
    def n_launches(self) -> int:
        """Launches that reach the device."""
        return sum(not launch.host_only for launch in self.launches)

    @property
    def nbytes(self) -> int:
        """Bytes that the launches must move: each operand of each once, each result once."""
        return sum(launch.nbytes for launch in self.launches)

    @property
    def nbytes_unplanned(self) -> int:
        """The same, if each op of the planned graph were run by itself."""
        return sum(op.nbytes for op in self.graph.ops)

    def refusal_counts(self) -> "Counter[str]":
        """How often each reason kept two ops apart."""
        return Counter(refusal.reason for refusal in self.refusals)
