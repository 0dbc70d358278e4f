"""A launch of kernels, ready to start: everything but addresses and moving numbers is worked out beforehand."""

import copy
import math
import struct
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Protocol

import torch

from kitsune.ir.graph import Slot
from kitsune.ir.plan import Access, Kernel, Launch
from kitsune.ir.program import Extent, Parameter, Pending, Pointer, Program, Scalar, Size, SlotAddress, Stride
from kitsune.ir.tensor_type import TensorType
from kitsune.runtime.launch_tables import LaterTables, Tables
from kitsune.runtime.slots import SlotTable

# Not the method, which is a door.
data_ptr = torch._C.TensorBase.data_ptr

Parameters = Sequence[Parameter]
# Indices are 32-bit below this: the last block may compute as many beyond the end as it has elements.
WIDE_FROM = 2**31 - 2**16


class KernelUnavailable(RuntimeError):
    """A kernel that cannot be compiled or started; `path` is its source, where it got as far."""

    def __init__(self, reason: str, path: str | None) -> None:
        super().__init__(f"{reason} Its source is {path}." if path else reason)
        self.reason = reason
        self.path = path


class Compiled(Protocol):
    """A program for a device; `block` is the number of elements per block of the grid."""

    block: int

    def launch(self, grid: int, args: Sequence[Any], stream: int) -> None: ...

    def load(self) -> None: ...


class Compiler(Protocol):
    """What makes programs runnable."""

    def compile(self, program: Program, target: torch.device, divisibility: int, wide: bool) -> Compiled: ...

    def parameters_of(self, kernel: Kernel, slots_in_memory: bool = ...) -> tuple[Parameter, ...]: ...

    def path_of(self, program: Program) -> Any: ...


class _Bound:
    """The parameters of one kernel: `values` with what never changes, and where pointers and moving numbers go."""

    def __init__(self, kernel: Kernel, parameters: Parameters) -> None:
        accesses = (*kernel.loads, *(store.access for store in kernel.stores))
        # What the grid is over: a kernel with reductions has blocks of rows.
        self.n = kernel.n_rows
        self.values: list[Any] = [0] * len(parameters)
        # (position, access, whether its address must be a multiple of 16 bytes)
        self.pointers: list[tuple[int, Access, bool]] = []
        self.slots: list[tuple[int, int]] = []
        self.doubles: list[int] = []
        # (position, number of the slot): addresses in the table of moving numbers.
        self.addresses: list[tuple[int, int]] = []
        # Of sizes and strides; of where elements end where nothing is reduced, there being few sizes that are no multiple of 16.
        self.divisibility = 16 if kernel.reduced > 0 or self.n % 16 == 0 else 1
        reached = [_reach(a.value.type, a.strides, kernel.domain) for a in accesses]
        self.wide = max([kernel.n_elements, *reached]) >= WIDE_FROM
        for position, parameter in enumerate(parameters):
            self._bind(position, parameter, kernel, accesses)

    def _bind(self, position: int, parameter: Any, kernel: Kernel, accesses: tuple[Access, ...]) -> None:
        if isinstance(parameter, Pointer):
            access = accesses[parameter.index]
            self.pointers.append((position, access, any(access.strides)))
        elif isinstance(parameter, Scalar):
            if isinstance(parameter.value, Slot):
                self.slots.append((position, parameter.value.index))
            else:
                self.values[position] = int(parameter.value) if parameter.type == "i64" else float(parameter.value)
            if parameter.type != "i64":
                self.doubles.append(position)
        elif isinstance(parameter, SlotAddress):
            self.addresses.append((position, parameter.index))
        else:
            self.values[position] = number = _number(parameter, kernel, accesses)
            if getattr(parameter, "counts", True):
                self.divisibility = math.gcd(self.divisibility, number)

    def fill(self, address: Callable[[Access], int], scalars: Sequence[float], slots_at: int) -> tuple[list[Any], int]:
        """The arguments of a start with the table of moving numbers at that address, and of which divisibility it may be."""
        values = self.values.copy()
        for position, index in self.addresses:
            values[position] = slots_at + 8 * index
        bits = 0
        for position, access, counts in self.pointers:
            values[position] = where = address(access)
            if counts:
                bits |= where
        for position, slot in self.slots:
            values[position] = float(scalars[slot])
        return values, 1 if bits & 15 else self.divisibility


# Of the 4,169 operands of ResNet-50's kernels, 206 differ in this.
@lru_cache(4096)
def _reach(type_: TensorType, strides: tuple[int, ...], domain: tuple[int, ...]) -> int:
    """The last element that is read or written; a kernel over windows reads all of its operand."""
    walks = ((domain, strides), (type_.shape, type_.stride))
    return max(sum((size - 1) * stride for size, stride in zip(*walk, strict=True)) for walk in walks)


def _number(parameter: Size | Extent | Stride, kernel: Kernel, accesses: tuple[Access, ...]) -> int:
    if isinstance(parameter, Extent):
        return kernel.n_columns if parameter.of_columns else kernel.n_rows
    if isinstance(parameter, Stride):
        return accesses[parameter.index].strides[parameter.dim]
    return kernel.n_elements if parameter.dim is None else kernel.domain[parameter.dim]


class PreparedLaunch:
    """The kernels of a launch, to be started any number of times.

    `program` is the text of all of them, a batched one if there are several. `device` is where their memory is; left out,
    that of their first operand. Nothing is compiled before the first start. With `slots_in_memory`, for which the program must
    have been rendered, moving numbers are read from a table, so that CUDA graphs can have the same program: `captured_with`
    gives what one captures.
    """

    def __init__(
        self,
        launch: Launch,
        program: Program,
        compiler: Compiler,
        device: torch.device | None = None,
        slots_in_memory: bool = False,
    ) -> None:
        if len(launch.kernels) > 1 and not program.batched:
            raise ValueError(f"{launch.name} needs a batched program: render it with batched=True.")
        self.launch = launch
        self.program = program
        self.name = program.name
        self._compiler = compiler
        first, written = launch.kernels[0], launch.written
        if written is not None and written.slots_in_memory == slots_in_memory:
            rest = [*written.rest]
        else:
            rest = [compiler.parameters_of(kernel, slots_in_memory) for kernel in launch.kernels[1:]]
        given = zip(launch.kernels, [program.parameters, *rest], strict=True)
        self._bound = [_Bound(kernel, parameters) for kernel, parameters in given]
        self._bound = [bound for bound in self._bound if bound.n]
        self._device = device or (*first.loads, *(s.access for s in first.stores))[0].value.type.device
        self._wide = any(bound.wide for bound in self._bound)
        self._variants: dict[int, Compiled] = {}
        self._tables = Tables(self._device)
        self._n_numbers = 1 + max((index for bound in self._bound for _, index in bound.addresses), default=-1)
        # Does it read from memory what a capture has elsewhere?
        self.differs_in_graph = program.batched or self._n_numbers > 0
        # Of ordinary starts, by stream: a table on another stream might not be written yet.
        self._numbers: dict[int, SlotTable] = {}
        # Of captured ones: the address of the only table.
        self._slots_at: int | None = None

    @property
    def likely(self) -> tuple[int, bool] | None:
        """Of the variant that starts will need, unless operands begin at odd addresses: its divisibility, and is it wide?"""
        return (self._common([bound.divisibility for bound in self._bound]), self._wide) if self._bound else None

    def _common(self, found: list[int]) -> int:
        """The text of a batch knows of multiples of 16 and of none."""
        return found[0] if not self.program.batched else 16 if min(found) == 16 else 1

    def reserve(self) -> None:
        """Once the program is there: work out what starts of a batch read that is always the same. ResNet-50's first run by plan
        would do so for 19 launches.

        Raises KernelUnavailable, Pending.
        """
        if self.program.batched and self.likely is not None:
            self._tables.prepare([bound.n for bound in self._bound], self._variant(self.likely[0]).block)

    def captured_with(self, slots_at: int) -> "PreparedLaunch":
        """For one capture: moving numbers are read from the table at that address, and what a batch reads from memory is
        written by `fill_tables` once the capture is over."""
        other = copy.copy(self)
        other._variants, other._tables, other._slots_at = {}, LaterTables(self._device, self._tables), slots_at
        return other

    def load(self, like: "PreparedLaunch") -> None:
        """Before a capture: compile and load the variants that `like` has used so far, make memory for tables.

        Raises KernelUnavailable, Pending.
        """
        likely = self.likely or (16, False)
        for divisibility in tuple(like._variants) or likely[:1]:
            compiled = self._variant(divisibility)
            compiled.load()
            if self.program.batched:
                sizes = [bound.n for bound in self._bound]
                self._tables.reserve(sizes, len(self.program.parameters), compiled.block)

    def fill_tables(self) -> None:
        """Write what captured starts are to read from memory, on the current stream."""
        self._tables.fill()

    def start(self, address: Callable[[Access], int], scalars: Sequence[float], stream: int) -> None:
        """Put the kernels on the current stream, whose handle is `stream`. `address` tells where an access's first element is.

        Raises KernelUnavailable, and Pending for a variant that is still being compiled: then nothing was started.
        """
        if not self._bound:
            return
        try:
            if (slots_at := self._slots_at) is None:
                slots_at = self._table_with(scalars, stream) if self._n_numbers else 0
            if self.program.batched:
                self._start_batch(address, scalars, slots_at, stream)
            else:
                args, divisibility = self._bound[0].fill(address, scalars, slots_at)
                compiled = self._variant(divisibility)
                compiled.launch(-(-self._bound[0].n // compiled.block), args, stream)
        except (torch.OutOfMemoryError, KernelUnavailable, Pending):
            raise
        except Exception as error:
            raise self._unavailable("started", error) from error

    def _table_with(self, scalars: Sequence[float], stream: int) -> int:
        """The address of a table with these numbers, on the current stream."""
        table = self._numbers.get(stream)
        if table is None:
            table = self._numbers[stream] = SlotTable(self._n_numbers, self._device)
        table.set(scalars)
        return table.address

    def _variant(self, divisibility: int) -> Compiled:
        found = self._variants.get(divisibility)
        if found is None:
            try:
                found = self._compiler.compile(self.program, self._device, divisibility, self._wide)
            except Pending:
                raise
            except Exception as error:
                raise self._unavailable("compiled", error) from error
            self._variants[divisibility] = found
        return found

    def _unavailable(self, what: str, error: Exception) -> KernelUnavailable:
        try:
            path = str(self._compiler.path_of(self.program))
        except Exception:  # the source could not be written, which is said already
            path = None
        return KernelUnavailable(f"The kernel {self.name} could not be {what}: {type(error).__name__}: {error}.", path)

    def _start_batch(self, address: Callable[[Access], int], scalars: Sequence[float], slots_at: int, stream: int) -> None:
        rows, divisibilities = [], []
        for bound in self._bound:
            values, divisibility = bound.fill(address, scalars, slots_at)
            for position in bound.doubles:
                values[position] = _bits(values[position])
            rows.append(values)
            divisibilities.append(divisibility)
        compiled = self._variant(self._common(divisibilities))
        sizes = [bound.n for bound in self._bound]
        grid, blocks = self._tables.blocks(sizes, compiled.block, stream)
        table = self._tables.table(rows, sizes, compiled.block, stream)
        compiled.launch(grid, [data_ptr(table), data_ptr(blocks)], stream)


def _bits(number: float) -> int:
    return int(struct.unpack("q", struct.pack("d", number))[0])
