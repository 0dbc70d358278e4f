"""A launch of kernels, ready to start: everything but addresses and moving numbers is worked out beforehand."""

import struct
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from kitsune.ir.graph import Slot
from kitsune.ir.plan import Access, Kernel, Launch, Pointer, Program, Scalar, Size, Stride

Parameters = Sequence[Pointer | Size | Stride | Scalar]
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


class Compiler(Protocol):
    """What makes programs runnable."""

    def compile(self, program: Program, target: torch.device, aligned: bool, wide: bool) -> Compiled: ...

    def parameters_of(self, kernel: Kernel) -> Parameters: ...

    def path_of(self, program: Program) -> Any: ...


class _Bound:
    """The parameters of one kernel: `values` with what never changes, and where pointers and moving numbers go."""

    def __init__(self, kernel: Kernel, parameters: Parameters) -> None:
        accesses = (*kernel.loads, *(store.access for store in kernel.stores))
        self.n = kernel.n_elements
        self.values: list[Any] = [0] * len(parameters)
        # (position, access, whether its address must be a multiple of 16 for the aligned variant)
        self.pointers: list[tuple[int, Access, bool]] = []
        self.slots: list[tuple[int, int]] = []
        self.doubles: list[int] = []
        self.aligned = self.n % 16 == 0
        self.wide = max([self.n, *(_reach(a, kernel.domain) for a in accesses)]) >= WIDE_FROM
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
        else:
            self.values[position] = number = _number(parameter, kernel, accesses)
            self.aligned = self.aligned and number % 16 == 0

    def fill(self, address: Callable[[Access], int], scalars: Sequence[float]) -> tuple[list[Any], bool]:
        """The arguments of a start, and whether the aligned variant may run."""
        values = self.values.copy()
        bits = 0
        for position, access, counts in self.pointers:
            values[position] = where = address(access)
            if counts:
                bits |= where
        for position, slot in self.slots:
            values[position] = float(scalars[slot])
        return values, self.aligned and not bits & 15


def _reach(access: Access, domain: tuple[int, ...]) -> int:
    return sum((size - 1) * stride for size, stride in zip(domain, access.strides, strict=True))


def _number(parameter: Size | Stride, kernel: Kernel, accesses: tuple[Access, ...]) -> int:
    if isinstance(parameter, Stride):
        return accesses[parameter.index].strides[parameter.dim]
    return kernel.n_elements if parameter.dim is None else kernel.domain[parameter.dim]


class PreparedLaunch:
    """The kernels of a launch, to be started any number of times.

    `program` is the text of all of them, a batched one if there are several. `device` is where their memory is; left out,
    that of their first operand. Nothing is compiled before the first start.
    """

    def __init__(self, launch: Launch, program: Program, compiler: Compiler, device: torch.device | None = None) -> None:
        if len(launch.kernels) > 1 and not program.batched:
            raise ValueError(f"{launch.name} needs a batched program: render it with batched=True.")
        self.launch = launch
        self.program = program
        self.name = program.name
        self._compiler = compiler
        first = launch.kernels[0]
        given = [program.parameters, *(compiler.parameters_of(kernel) for kernel in launch.kernels[1:])]
        self._bound = [_Bound(kernel, p) for kernel, p in zip(launch.kernels, given, strict=True)]
        self._bound = [bound for bound in self._bound if bound.n]
        self._device = device or (*first.loads, *(s.access for s in first.stores))[0].value.type.device
        self._wide = any(bound.wide for bound in self._bound)
        self._variants: dict[bool, Compiled] = {}
        self._tables = _Tables(self._device)

    def start(self, address: Callable[[Access], int], scalars: Sequence[float], stream: int) -> None:
        """Put the kernels on the current stream, whose handle is `stream`. `address` tells where an access's first element is.

        Raises KernelUnavailable, in which case nothing was started.
        """
        if not self._bound:
            return
        try:
            if self.program.batched:
                self._start_batch(address, scalars, stream)
            else:
                args, aligned = self._bound[0].fill(address, scalars)
                compiled = self._variant(aligned)
                compiled.launch(-(-self._bound[0].n // compiled.block), args, stream)
        except (torch.OutOfMemoryError, KernelUnavailable):
            raise
        except Exception as error:
            raise self._unavailable("started", error) from error

    def _variant(self, aligned: bool) -> Compiled:
        found = self._variants.get(aligned)
        if found is None:
            try:
                found = self._compiler.compile(self.program, self._device, aligned, self._wide)
            except Exception as error:
                raise self._unavailable("compiled", error) from error
            self._variants[aligned] = found
        return found

    def _unavailable(self, what: str, error: Exception) -> KernelUnavailable:
        try:
            path = str(self._compiler.path_of(self.program))
        except Exception:  # the source could not be written, which is said already
            path = None
        return KernelUnavailable(f"The kernel {self.name} could not be {what}: {type(error).__name__}: {error}.", path)

    def _start_batch(self, address: Callable[[Access], int], scalars: Sequence[float], stream: int) -> None:
        rows, all_aligned = [], True
        for bound in self._bound:
            values, aligned = bound.fill(address, scalars)
            for position in bound.doubles:
                values[position] = _bits(values[position])
            rows.append(values)
            all_aligned = all_aligned and aligned
        compiled = self._variant(all_aligned)
        grid, blocks = self._tables.blocks([bound.n for bound in self._bound], compiled.block)
        table = self._tables.table(rows, [bound.n for bound in self._bound], compiled.block, stream)
        compiled.launch(grid, [table.data_ptr(), blocks.data_ptr()], stream)


def _bits(number: float) -> int:
    return int(struct.unpack("q", struct.pack("d", number))[0])


class _Tables:
    """What a batch reads from memory: its parameters by kernel, and the kernel of each block. Kept while they do not change."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._blocks: tuple[int, torch.Tensor] | None = None
        # By stream: the rows and the table with them. A table on another stream might not be written yet.
        self._tables: dict[int, tuple[list[list[int]], torch.Tensor]] = {}

    def blocks(self, sizes: Sequence[int], block: int) -> tuple[int, torch.Tensor]:
        """The number of blocks, and for each the number of its kernel."""
        if self._blocks is None:
            counts = torch.tensor([-(-n // block) for n in sizes])
            owners = torch.repeat_interleave(torch.arange(len(sizes), dtype=torch.int32), counts)
            self._blocks = (owners.numel(), owners.to(self._device))
            if self._device.type == "cuda":
                # Other streams read it as well, and this happens once.
                torch.cuda.current_stream(self._device).synchronize()
        return self._blocks

    def table(self, rows: list[list[int]], sizes: Sequence[int], block: int, stream: int) -> torch.Tensor:
        """The rows in memory that kernels on the stream can read."""
        known = self._tables.get(stream)
        if known is not None and known[0] == rows:
            return known[1]
        first, complete = 0, []
        for row, n in zip(rows, sizes, strict=True):
            complete.append([*row, first])
            first += -(-n // block)
        table = self._on_device(torch.tensor(complete, dtype=torch.int64))
        self._tables[stream] = (rows, table)
        return table

    def _on_device(self, host: torch.Tensor) -> torch.Tensor:
        if self._device.type != "cuda":
            return host
        # Pinned, so that the host does not wait; on the current stream, where the launch goes as well. It cannot be named by
        # its handle: torch takes the handle 0 of the default stream for a wish for a new one.
        return host.pin_memory().to(self._device, non_blocking=True)
