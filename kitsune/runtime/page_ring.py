"""The host's side of the pages: they are written by plain stores, and the driver hears of nothing but the graph's start."""

import ctypes
import struct
import time
import weakref
from collections.abc import Sequence

import torch

from kitsune.ir.page import HEAD, N_COPIES, N_PAGES
from kitsune.runtime.page_reader import PageReader, Pages
from kitsune.runtime.slots import SlotTable, bits_of

_data_ptr = torch._C.TensorBase.data_ptr
_WORD = 8
# How often it is looked whether a page was read, and after how long the device is asked what is the matter.
LOOK_S, ASK_S = 20e-6, 1.0


class PageRing:
    """The pages of one graph: each graph has its own, so that the order in which several are replayed needs no thought.

    `targets` are address and bytes of the tensors that come in. For each replay `write` a page, start the graph, and say so with
    `started`. Where something broke off in between, the device is asked how many replays it has seen, since it counts for itself.
    """

    def __init__(self, targets: Sequence[tuple[int, int]], table: SlotTable, reader: PageReader) -> None:
        device, words = table.memory.device, HEAD + len(targets) + N_COPIES + table.n
        self._size = words * _WORD
        memory = _taken(_WORD + N_PAGES * self._size, device)
        # A replay that is under way may still read it when this is gone.
        weakref.finalize(self, _given_back, memory, device).atexit = False
        address = _data_ptr(memory)
        self._bytes = memoryview((ctypes.c_char * memory.numel()).from_address(address)).cast("B")
        # Replays that are over, as the one that has begun last has said.
        self._over = ctypes.c_int64.from_address(address)
        self._head = struct.Struct(f"{HEAD + len(targets) + N_COPIES}q")
        self._reading = reader.of(Pages(address + _WORD, address, table.address, targets, words))
        self.read, self.copy_out = self._reading.start, self._reading.copy_out
        self._n_numbers = table.n
        # The replays that were started, the first that must wait, and is there a page that may have been replayed or not?
        self._n, self._room, self._in_doubt = 0, N_PAGES, False
        # The numbers on the device, and the tuple that they came from.
        self._bits: bytes | None = None
        self._numbers: Sequence[float] | None = None

    def restart(self) -> None:
        """Nothing has been replayed so far."""
        self._reading.restart()
        self._over.value = 0
        self._begin(0)

    def write(self, addresses: Sequence[int], numbers: Sequence[float]) -> None:
        """Tell the next replay, which is on the current stream, where the tensors are, where to copy results (0: not at all), and
        which numbers have changed.

        A run that has diverged may have more numbers behind those of its region, or had them when the table was made.
        """
        if self._in_doubt:
            self._ask()
        if self._n >= self._room:
            self._wait()
        self._in_doubt = True
        at, n_changed = _WORD + self._n % N_PAGES * self._size, 0
        if numbers is not self._numbers:
            bits = bits_of(numbers[: self._n_numbers])
            if bits != self._bits:
                n_changed, behind = len(bits) // _WORD, at + self._head.size
                self._bytes[behind : behind + len(bits)] = bits
                self._bits = bits
            # What is in a tuple stays as it is; of a list nobody can say.
            self._numbers = numbers if type(numbers) is tuple else None
        self._head.pack_into(self._bytes, at, n_changed, *addresses)

    def started(self) -> None:
        """The graph was started with the page that was written last."""
        self._n += 1
        self._in_doubt = False

    def _wait(self) -> None:
        """The device has yet to read what would be overwritten."""
        began = time.monotonic()
        while self._n >= self._over.value + N_PAGES:
            time.sleep(LOOK_S)
            if time.monotonic() - began > ASK_S:
                # Raises what has befallen it.
                self._ask()
                began = time.monotonic()
        self._room = self._over.value + N_PAGES

    def _ask(self) -> None:
        """Ask the device how far it is."""
        self._begin(self._reading.n_started())

    def _begin(self, n: int) -> None:
        """After so many replays nothing else is known."""
        self._n, self._room, self._in_doubt = n, self._over.value + N_PAGES, False
        self._bits = self._numbers = None


# Memory of rings that are gone, by device and bytes.
_idle: dict[tuple[torch.device, int], list[torch.Tensor]] = {}


def _taken(nbytes: int, device: torch.device) -> torch.Tensor:
    """Host memory that the device reads by itself: zeros, a page that brings nothing."""
    nbytes = 1 << max(nbytes - 1, 0).bit_length()
    try:
        memory = _idle.setdefault((device, nbytes), []).pop()
    except IndexError:
        return torch.zeros(nbytes, dtype=torch.uint8, device="cpu", pin_memory=device.type == "cuda")
    if device.type == "cuda":
        with torch.cuda.device(device):
            # Not the function of torch.cuda, which is a door.
            torch._C._cuda_synchronize()
    return memory.zero_()


def _given_back(memory: torch.Tensor, device: torch.device) -> None:
    _idle.setdefault((device, memory.numel()), []).append(memory)
