"""What a captured graph begins with on a device: the kernels that read a page and copy the batch in."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from kitsune.ir import Pending, Program
from kitsune.runtime.launch_tables import complete_rows, owners_of
from kitsune.runtime.plan_executor import current_stream

_data_ptr = torch._C.TensorBase.data_ptr


class Loadable(Protocol):
    """A program for a device; a block of it works on `block` words or bytes."""

    block: int

    def launch(self, grid: int, args: Sequence[Any], stream: int) -> None: ...

    def load(self) -> None: ...


class Compiler(Protocol):
    """What makes programs runnable. Raises Pending for one that is still being compiled."""

    def compile(self, program: Program, target: torch.device, aligned: bool, wide: bool) -> Loadable: ...


@dataclass(frozen=True, slots=True)
class Pages:
    """What the kernels of one graph work on, as addresses: the first page, the word of the host's memory that says how many
    replays are over, and the moving numbers; and of each tensor that is filled address and bytes. A page has `words` words."""

    first: int
    over: int
    numbers: int
    targets: Sequence[tuple[int, int]]
    words: int


class PageReader:
    """The two kernels, for a device. `programs` are the one that reads a page and the one that copies."""

    def __init__(self, programs: tuple[Program, Program], compiler: Compiler, device: torch.device) -> None:
        self._programs, self._compiler, self._device = programs, compiler, device
        self._kernels: list[Loadable] = []

    def is_there(self) -> bool:
        """Can it be captured, where nothing may be compiled or loaded? If not, the driver is to copy."""
        if not self._kernels:
            try:
                kernels = [self._compiler.compile(program, self._device, False, False) for program in self._programs]
                for kernel in kernels:
                    kernel.load()
            except Pending:
                return False
            self._kernels = kernels
        return True

    def of(self, pages: Pages) -> "Reading":
        """The kernels of one graph, which begins with the first page."""
        read, copy = self._kernels
        return Reading(pages, read, copy, self._device)


class Reading:
    """Of one graph. On the device are how often it was replayed, the addresses in the page that was read last, and what is to
    be copied where."""

    def __init__(self, pages: Pages, read: Loadable, copy: Loadable, device: torch.device) -> None:
        self._pages, self._read, self._copy, self._device = pages, read, copy, device
        self._words = torch.zeros(1 + len(pages.targets), dtype=torch.int64, device=device)
        sizes = [size for _, size in pages.targets]
        if sizes:
            self._rows = complete_rows([[*target] for target in pages.targets], sizes, copy.block).to(device)
            self._owners = owners_of(sizes, copy.block).to(device)

    def start(self) -> None:
        """Read the next page and copy what it names, on the current stream. Nothing else than this is captured."""
        pages, count, stream = self._pages, _data_ptr(self._words), current_stream(self._device)
        places = count + self._words.itemsize
        n = len(pages.targets)
        self._read.launch(1, [pages.first, pages.over, count, places, pages.numbers, n, pages.words], stream)
        if n:
            self._copy.launch(len(self._owners), [places, _data_ptr(self._rows), _data_ptr(self._owners)], stream)

    def restart(self) -> None:
        """Begin with the first page again, on the current stream."""
        self._words.zero_()

    def n_started(self) -> int:
        """How often it was started; waits for the current stream."""
        return int(torch.ops.aten._local_scalar_dense(self._words[0]))
