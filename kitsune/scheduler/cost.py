"""What a launch is thought to take. Only a matter of speed: any numbers here give the same results."""

import math
from dataclasses import dataclass

import torch

from kitsune.ir import Graph, Kernel, Kind, Launch, Op


@dataclass(frozen=True, slots=True)
class Rates:
    """Ceilings of a device: bytes and bf16 floating-point operations per microsecond, and what a launch costs by itself."""

    bytes_per_us: float
    flops_per_us: float
    launch_us: float
    n_multiprocessors: int


# sm_90: a device copy reaches 4.3 TB/s and a bf16 product 790 TFLOP/s on an H200; sm_80: the vendor's 1.6 TB/s and 312 TFLOP/s,
# of which 85 % are reached. A launch inside a busy stream leaves the device idle for about 2 us.
RATES = {
    "sm_80": Rates(1.36e6, 265e6, 2.0, 108),
    "sm_90": Rates(4.3e6, 790e6, 2.0, 132),
}
# The part of a product that one multiprocessor computes at a time, in elements of the result.
TILE = 128 * 128
# What a device with 4.3 TB/s has under way, at about 1 us from memory to a register.
BYTES_IN_FLIGHT = 4 << 20
# Below this share of the device, a launch takes little more than its start.
SMALLEST_SHARE = 0.05
# A walk whose innermost step is not 1 reads a sector of 32 bytes for each element.
SECTOR = 32


def kernel_micros(kernel: Kernel, rates: Rates) -> float:
    """Modelled time of a kernel alone, without its launch."""
    accesses = (*kernel.loads, *(store.access for store in kernel.stores))
    moved = 0.0
    for access in accesses:
        itemsize = access.value.type.dtype.itemsize
        n = kernel.touched(access)
        step = min((s for s in access.strides if s), default=1) if kernel.reduced else access.strides[-1] if kernel.domain else 1
        moved += n * (min(SECTOR, step * itemsize) / itemsize if step > 1 else 1)
    return moved / rates.bytes_per_us


def op_micros(op: Op, rates: Rates) -> float:
    """Modelled time of a library call: a matrix product by its operations, everything else by its bytes."""
    return max(op.nbytes / rates.bytes_per_us, product_micros(op, rates))


@dataclass(frozen=True, slots=True)
class Load:
    """What a launch asks of the device: `micros` alone, its start included, and `full` if it could use all of the device."""

    micros: float
    full: float


def _share(launch: Launch, rates: Rates) -> float:
    """The part of the device that a launch can use, from 0 to 1: a product has too few tiles for all multiprocessors, or some
    left for a last round; anything else too few bytes to keep the memory busy."""
    if launch.op is not None and launch.op.kind is Kind.GEMM and launch.op.results:
        tiles = max(-(-math.prod(launch.op.results[0].type.shape) // TILE), 1)
        rounds = -(-tiles // rates.n_multiprocessors)
        return tiles / (rounds * rates.n_multiprocessors)
    return min(launch.nbytes / BYTES_IN_FLIGHT, 1.0)


def product_micros(op: Op, rates: Rates) -> float:
    """Modelled time of a matrix product by its operations; 0 for any other op."""
    if op.kind is not Kind.GEMM or not op.results or len(op.inputs) < 2:
        return 0.0
    inner = op.inputs[-2].type.shape[-1] if op.inputs[-2].type.shape else 1
    return 2.0 * math.prod(op.results[0].type.shape) * inner / rates.flops_per_us


# A product in 16 bits with an odd dimension takes six times as long as one whose rows are whole vectors: 15.5 ms instead of 2.6
# for the three of GPT-2's vocabulary on an H200 (benchmarks/bench_padding.py).
UNALIGNED = 6.0
# What padding must gain, so that small products keep the library's own choice.
PADDED_FROM_US = 20.0

# A convolution whose channels are no multiple of 8 takes so many times as long as a matrix product with as many operations:
# 584 us forward and 353 backward instead of 25 and 29 for ViT-B/16's patches of three channels on an H200.
ODD_CHANNELS = 10.0

# Loading a channel's numbers for each element is what limits a kernel from about so many times its other bytes on, where those
# are as many as here. On an H200 batch norm with a rectifier, and two of them in one, went from 66 to 51 and from 119 to 83 us
# in rows; the gradient behind them, which loads twice its other bytes, stayed at 73.
BROADCAST, BROADCAST_BYTES = 2.5, 4 << 20

# Making values again takes arithmetic in place of memory: it must save so much, and so many times what it reads.
AGAIN_BYTES, AGAIN = 32 << 20, 4
# What pooling must move for a kernel of ours to be worth its compilation.
WINDOW_BYTES = 16 << 20

# What another layout must gain, so that small images keep the library's own choice.
LAYOUT_FROM_US = 20.0
# Elements in a row from which on the jump to the next one does not count: 128 bytes of a 16-bit type.
LONG_ROW = 64
# What a kernel of ours must write to beat the library's GELU by more than a compilation is worth.
GELU_BYTES = 4 << 20
# What a kernel must move to be worth its compilation where the library takes given memory too.
STRIDED_BYTES = 1 << 20

# Started together, small kernels save their launches; large ones fill the device alone, and would only hold memory longer.
BATCH_BELOW_US = 50.0
# The partial sums of a layer's gradients (197 of each of 3072 in ViT-B/16) take 2.4 MB.
REDUCED_BATCH_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Costs:
    """What pays, on a device with these rates. Every answer of these is correct; some are fast."""

    rates: Rates

    def joining(self, saved_bytes: int, saved_launches: int) -> bool:
        """Does it pay that an op joins a kernel?"""
        return saved_bytes / self.rates.bytes_per_us + saved_launches * self.rates.launch_us > 0

    def load(self, launch: Launch) -> Load:
        """What a launch asks of the device, by its modelled time."""
        body = max(launch.micros - self.rates.launch_us, 0.0)
        return Load(self.rates.launch_us + body / max(_share(launch, self.rates), SMALLEST_SHARE), body)

    def batching(self, kernel: Kernel) -> bool:
        """Does it pay to start a kernel together with others of its source?

        What it reads is held until the last of them can be started, which for what is to be reduced may be long.
        """
        if kernel.reduced:
            return kernel.nbytes <= REDUCED_BATCH_BYTES
        return kernel_micros(kernel, self.rates) < BATCH_BELOW_US

    def alone(self, kernel: Kernel, has_out_form: bool) -> bool:
        """Does a kernel that is in no batch beat the library?

        With one op only it moves the same bytes, and must be compiled. But the plan can give it memory, which a cast, for one,
        takes from nobody. Rows with gaps between them the library takes element by element (a copy of 39 MB in rows of 768 takes
        it 25 us on an H200, of which the bytes are 10); walks that jump for each element are left to its kernels made for them.
        """
        op = kernel.steps[0].op
        if len(kernel.steps) > 1 or kernel.reduced or op.kind is Kind.WINDOW:
            return True
        if op.target is torch.ops.aten.gelu.default and op.results[0].type.nbytes >= GELU_BYTES:
            # As exact, and with fewer instructions for an element: 31 us for 50 MB on an H200, and the library's 36.
            return True
        if has_out_form:
            return len(kernel.domain) > 1 and _in_long_rows(kernel) and kernel.nbytes >= STRIDED_BYTES
        return len(kernel.domain) <= 1 or _in_long_rows(kernel)

    def in_rows(self, kernel: Kernel) -> bool:
        """Does it pay that a kernel keeps what it broadcasts?"""
        both = [[0, 0], [0, 0]]
        for access in (*kernel.loads, *(store.access for store in kernel.stores)):
            both[bool(access.strides[0])][bool(access.strides[-1])] += access.value.type.dtype.itemsize
        (_, broadcast), (_, moved) = both
        return broadcast >= BROADCAST * moved and kernel.nbytes >= BROADCAST_BYTES

    def in_long_rows(self, kernel: Kernel) -> bool:
        """Does it pay that a kernel goes through rows of neighbours, if it keeps what it broadcasts for each?"""
        return kernel.nbytes >= BROADCAST_BYTES

    def making_again(self, kept_bytes: int, read_bytes: int) -> bool:
        """Does it pay to make values again instead of writing and reading them, if what they come from is read for it?"""
        return kept_bytes - read_bytes >= AGAIN_BYTES and kept_bytes >= AGAIN * read_bytes

    def windows(self, op: Op) -> bool:
        """Does it pay to have a pooling op in a kernel of ours?"""
        return op.nbytes >= WINDOW_BYTES

    def worth_padding(self, op: Op) -> bool:
        """Could padding a matrix product pay at all?"""
        return (UNALIGNED - 1) * product_micros(op, self.rates) >= PADDED_FROM_US

    def padding(self, op: Op, copied_bytes: float, n_operands: int) -> bool:
        """Does it pay to make a product larger, if so many bytes are moved for it, and the edges of its operands cleared?"""
        spent = copied_bytes / self.rates.bytes_per_us + n_operands * self.rates.launch_us
        return (UNALIGNED - 1) * product_micros(op, self.rates) - spent >= PADDED_FROM_US

    def as_product(self, flops: float, copied_bytes: float) -> bool:
        """Does it pay to make a convolution of odd channels a matrix product, if so many bytes are moved for it?"""
        gained = (ODD_CHANNELS - 1) * flops / self.rates.flops_per_us
        return gained - copied_bytes / self.rates.bytes_per_us >= PADDED_FROM_US

    def channels_last(self, image_bytes: int, copied_bytes: int) -> bool:
        """Does it pay to have connected convolutions in channels-last, if so many bytes are moved for it at the edges?

        The library reads and writes each of their images once more otherwise.
        """
        return (2 * image_bytes - copied_bytes) / self.rates.bytes_per_us >= LAYOUT_FROM_US


# Blocks of a kernel with reductions that keep the largest device busy; each takes a row, or neighbouring elements of 64 rows.
# Those read less at a time, so that more are wanted: batch norm's statistics took 46 us with 512 of them on an H200, 38 with 1024
# and 48 with 2048.
BUSY, WANTED, WANTED_ACROSS, NEIGHBOURS = 132, 512, 1024, 64
# Elements of a row that a part must have at least: below, the parts themselves would be much to write.
LEAST_INNER, LEAST_OUTER = 1024, 32
# Parts of rows that a kernel along them adds up beside what it does: three blocks of rows of 1024 elements for each of an H200's
# 132 multiprocessors, and more of shorter rows. A part is to be of so many rows.
BESIDE, BESIDE_ROWS, BESIDE_COLUMNS, BESIDE_MOST = 396, 8, 1024, 4096
# What a single block is done with before another launch would have begun.
ONE_BLOCK = 1 << 15


def parts(rows: int, columns: int, inner: bool, beside: bool = False) -> int:
    """Into how many parts to cut each of so many rows, so that a reduction fills the device; 1: leave them whole.

    `inner`: neighbours in memory belong to one row. `beside`: a kernel along what are columns here may make the parts.
    """
    if rows * columns <= ONE_BLOCK:
        return 1
    if beside and rows <= BESIDE_MOST:
        wanted = BESIDE * max(BESIDE_COLUMNS // (1 << max(rows - 1, 0).bit_length()), 1)
        if columns >= wanted * BESIDE_ROWS:
            return wanted
    blocks = rows if inner else -(-rows // NEIGHBOURS)
    if blocks >= BUSY:
        return 1
    wanted = WANTED if inner else WANTED_ACROSS
    return max(min(-(-wanted // blocks), columns // (LEAST_INNER if inner else LEAST_OUTER)), 1)


def graph_micros(graph: Graph, rates: Rates) -> float:
    """Modelled time of a graph run op by op."""
    launches = sum(not op.starts_nothing for op in graph.ops)
    return sum(op_micros(op, rates) for op in graph.ops) + launches * rates.launch_us


def _in_long_rows(kernel: Kernel) -> bool:
    accesses = (*kernel.loads, *(store.access for store in kernel.stores))
    return kernel.domain[-1] >= LONG_ROW and all(access.strides[-1] == 1 for access in accesses)
