"""What a captured graph begins and ends with on a device: the kernels that read a page, copy the batch in, and results out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from kitsune.ir import Pending, Program, streams
from kitsune.ir.page import N_COPIES
from kitsune.runtime.launch_tables import complete_rows, owners_of

_data_ptr = torch._C.TensorBase.data_ptr


class Loadable(Protocol):
    """A program for a device; a block of it works on `block` words or bytes."""

    block: int

    def launch(self, grid: int, args: Sequence[Any], stream: int) -> None: ...

    def load(self) -> None: ...


class Compiler(Protocol):
    """What makes programs runnable. Raises Pending for one that is still being compiled."""

    def compile(self, program: Program, target: torch.device, divisibility: int, wide: bool) -> Loadable: ...


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
    """The kernels, for a device. `programs` are the one that reads a page, the one that copies tensors in, and the one that
    copies a result out."""

    def __init__(self, programs: Sequence[Program], compiler: Compiler, device: torch.device) -> None:
        self._programs, self._compiler, self._device = programs, compiler, device
        self._kernels: list[Loadable] = []
        self._is_broken = False

    def is_there(self) -> bool:
        """Can it be captured, where nothing may be compiled or loaded? If not, the driver is to copy."""
        if not self._kernels and not self._is_broken:
            try:
                kernels = [self._compiler.compile(program, self._device, 1, False) for program in self._programs]
                for kernel in kernels:
                    kernel.load()
                self._kernels = kernels
            except Pending:
                return False
            except Exception:
                # What is wrong is told of the kernels of regions, which will hardly do better, and nothing is lost but time.
                self._is_broken = True
        return bool(self._kernels)

    def of(self, pages: Pages) -> "Reading":
        """The kernels of one graph, which begins with the first page."""
        return Reading(pages, self._kernels, self._device)


class Reading:
    """Of one graph. On the device are how often it was replayed, the addresses in the page that was read last, and what is to
    be copied where."""

    def __init__(self, pages: Pages, kernels: Sequence[Loadable], device: torch.device) -> None:
        self._pages, self._device = pages, device
        self._read, copy, self._copy_result = kernels
        self._copy = copy
        self._words = torch.zeros(1 + len(pages.targets) + N_COPIES, dtype=torch.int64, device=device)
        self._places = _data_ptr(self._words) + self._words.itemsize
        sizes = [size for _, size in pages.targets]
        if sizes:
            self._rows = complete_rows([[*target] for target in pages.targets], sizes, copy.block).to(device)
            self._owners = owners_of(sizes, copy.block).to(device)

    def start(self) -> None:
        """Read the next page and copy what it names, on the current stream."""
        pages, count, stream = self._pages, _data_ptr(self._words), streams.current_handle(self._device)
        n = len(pages.targets) + N_COPIES
        self._read.launch(1, [pages.first, pages.over, count, self._places, pages.numbers, n, pages.words], stream)
        if pages.targets:
            self._copy.launch(len(self._owners), [self._places, _data_ptr(self._rows), _data_ptr(self._owners)], stream)

    def copy_out(self, results: Sequence[torch.Tensor]) -> None:
        """Copy these to where the page says, on the current stream: at most `N_COPIES`, of at most `FEW_BYTES` each."""
        place, stream = self._places + self._words.itemsize * len(self._pages.targets), streams.current_handle(self._device)
        for k, result in enumerate(results):
            args = [place + self._words.itemsize * k, _data_ptr(result), result.numel() * result.itemsize]
            self._copy_result.launch(1, args, stream)

    def restart(self) -> None:
        """Begin with the first page again, on the current stream."""
        self._words.zero_()

    def n_started(self) -> int:
        """How often it was started; waits for the current stream."""
        return int(torch.ops.aten._local_scalar_dense(self._words[0]))
