"""Which of several tiles is the fastest for a launch: each is started on its device in turn, on memory that nobody needs."""

import statistics
from collections.abc import Callable, Mapping

import torch

from kitsune.ir import Launch, Pending, slots_in
from kitsune.ir.plan import Access, Kernel
from kitsune.ir.program import Tile
from kitsune.runtime.frame import Startable

# Rounds in which each tile is started once.
ROUNDS = 5
# Rounds that may pass without a start because a variant is still being compiled.
PATIENCE = 100
# Addresses in the scratch memory are as far from a multiple of this as they are in their own.
ALIGNMENT = 512
# What scratch memory is filled with: 0.186 in float32 and bfloat16, 1.56 in float16, True, and no position in any row.
FILLING = 0x3E

# Starts some runs one after the other, and returns what tells the seconds of each: None while the device is not that far.
Timer = Callable[[list[Callable[[], None]]], Callable[[], list[float] | None]]


class Trial:
    """Programs of one launch by tile, the first choice first. Of each the median counts, over rounds that begin with another
    tile each time: what disturbs the device for a while disturbs them all."""

    def __init__(self, launch: Launch, programs: Mapping[Tile, Startable]) -> None:
        self.launch = launch
        self.first = next(iter(programs))
        self._programs = dict(programs)
        self._seconds: dict[Tile, list[float]] = {tile: [] for tile in programs}
        self._open: tuple[list[Tile], Callable[[], list[float] | None]] | None = None
        self._n_pending = 0
        (self._kernel,) = launch.kernels
        self._places, self.nbytes = places_of(self._kernel)
        slots = [slot.index for op in launch.ops for slot in slots_in((op.args, op.kwargs))]
        self._scalars = [1.0] * (1 + max(slots, default=-1))

    @property
    def is_open(self) -> bool:
        """Was a round started of which nothing is known yet? Looks whether the device has got through it."""
        if self._open is None:
            return False
        tiles, seconds = self._open
        found = seconds()
        if found is None:
            return True
        self._open = None
        for tile, taken in zip(tiles, found, strict=True):
            self._seconds[tile].append(taken)
        return False

    @property
    def is_done(self) -> bool:
        """Is there nothing left to find out?"""
        return len(self._programs) < 2 or self.first not in self._programs or len(self._seconds[self.first]) >= ROUNDS

    @property
    def n_programs(self) -> int:
        """How many are started in a round."""
        return len(self._programs)

    @property
    def micros(self) -> dict[Tile, float]:
        """Microseconds of each tile that could be started."""
        return {tile: statistics.median(self._seconds[tile]) * 1e6 for tile in self._programs if self._seconds[tile]}

    def round(self, memory: torch.Tensor, timer: Timer, stream: int) -> None:
        """Start each tile once, on the current stream, whose handle is `stream`. `memory` are `nbytes` bytes or more."""
        memory[: self.nbytes].fill_(FILLING)
        base = torch._C.TensorBase.data_ptr(memory)
        base += -base % ALIGNMENT

        def address(access: Access) -> int:
            return base + self._places[id(access)]

        turn = len(self._seconds[self.first])
        tiles = list(self._programs)
        tiles = [*tiles[turn % len(tiles) :], *tiles[: turn % len(tiles)]]
        if not turn:
            tiles = self._started(tiles, address, stream)
        if tiles:
            runs = [self._run(tile, address, stream) for tile in tiles]
            self._open = (tiles, timer(runs))

    def _run(self, tile: Tile, address: Callable[[Access], int], stream: int) -> Callable[[], None]:
        return lambda: self._programs[tile].start(address, self._scalars, stream)

    def _started(self, tiles: list[Tile], address: Callable[[Access], int], stream: int) -> list[Tile]:
        """Before the first round: what cannot be started is left out, and a first start pays for what later ones find."""
        for tile in tiles:
            try:
                self._programs[tile].start(address, self._scalars, stream)
            except Pending:
                self._n_pending += 1
                if self._n_pending > PATIENCE:
                    del self._programs[tile]
                return []
            except Exception:
                del self._programs[tile]
        return list(self._programs)


def places_of(kernel: Kernel) -> tuple[dict[int, int], int]:
    """Where in scratch memory each access begins, by its id, and the bytes that all need. Accesses of one storage lie to each
    other as they do there."""
    accesses = (*kernel.loads, *(store.access for store in kernel.stores))
    bounds: dict[int, tuple[int, int]] = {}
    for access in accesses:
        first, end = _bounds(access, kernel)
        low, high = bounds.get(access.value.storage, (first, end))
        bounds[access.value.storage] = (min(low, first), max(high, end))
    begins, at = {}, 0
    for storage, (low, high) in bounds.items():
        low -= low % ALIGNMENT
        begins[storage] = at - low
        at += -(-(high - low) // ALIGNMENT) * ALIGNMENT
    places = {id(a): begins[a.value.storage] + _offset(a) for a in accesses}
    # The memory may begin in the middle.
    return places, at + ALIGNMENT


def _bounds(access: Access, kernel: Kernel) -> tuple[int, int]:
    """First byte and end of what is reached, and of the whole tensor: some kernels read neighbours of what they walk over."""
    type_ = access.value.type
    walked = sum((n - 1) * stride for n, stride in zip(kernel.domain, access.strides, strict=True))
    whole = sum((n - 1) * stride for n, stride in zip(type_.shape, type_.stride, strict=True))
    return _offset(access), _offset(access) + (max(walked, whole) + 1) * type_.dtype.itemsize


def _offset(access: Access) -> int:
    offset: int = access.value.type.offset
    return offset * access.value.type.dtype.itemsize
