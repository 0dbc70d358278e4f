"""What a launch is thought to take. Only a matter of speed: any numbers here give the same results."""

import math
from dataclasses import dataclass

from kitsune.ir import Graph, Kernel, Kind, Op, touched_bytes


@dataclass(frozen=True, slots=True)
class Rates:
    """Ceilings of a device: bytes and bf16 floating-point operations per microsecond, and what a launch costs by itself."""

    bytes_per_us: float
    flops_per_us: float
    launch_us: float


# sm_90: a device copy reaches 4.3 TB/s and a bf16 product 790 TFLOP/s on an H200; sm_80: the vendor's 1.6 TB/s and 312 TFLOP/s,
# of which 85 % are reached. A launch inside a busy stream leaves the device idle for about 2 us.
RATES = {
    "sm_80": Rates(1.36e6, 265e6, 2.0),
    "sm_90": Rates(4.3e6, 790e6, 2.0),
}
# A walk whose innermost step is not 1 reads a sector of 32 bytes for each element.
SECTOR = 32


def kernel_micros(kernel: Kernel, rates: Rates) -> float:
    """Modelled time of a kernel alone, without its launch."""
    accesses = (*kernel.loads, *(store.access for store in kernel.stores))
    moved = 0.0
    for access in accesses:
        itemsize = access.value.type.dtype.itemsize
        n = touched_bytes(access, kernel.domain)
        step = min((s for s in access.strides if s), default=1) if kernel.reduced else access.strides[-1] if kernel.domain else 1
        moved += n * (min(SECTOR, step * itemsize) / itemsize if step > 1 else 1)
    return moved / rates.bytes_per_us


def op_micros(op: Op, rates: Rates) -> float:
    """Modelled time of a library call: a matrix product by its operations, everything else by its bytes."""
    if op.kind is Kind.VIEW:
        return 0.0
    nbytes = sum(v.type.nbytes for v in op.inputs) + sum(v.type.nbytes for v in op.outputs)
    flops = 0.0
    if op.kind is Kind.GEMM and op.results and len(op.inputs) >= 2:
        inner = op.inputs[-2].type.shape[-1] if op.inputs[-2].type.shape else 1
        flops = 2.0 * math.prod(op.results[0].type.shape) * inner
    return max(nbytes / rates.bytes_per_us, flops / rates.flops_per_us)


# Started together, small kernels save their launches; large ones fill the device alone, and would only hold memory longer.
BATCH_BELOW_US = 50.0
# The partial sums of a layer's gradients take a quarter of this.
REDUCED_BATCH_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Costs:
    """What pays, on a device with these rates. Every answer of these three is correct; some are fast."""

    rates: Rates

    def joining(self, saved_bytes: int, saved_launches: int) -> bool:
        """Does it pay that an op joins a kernel?"""
        return saved_bytes / self.rates.bytes_per_us + saved_launches * self.rates.launch_us > 0

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
        takes from nobody; walks that jump through memory are left to kernels of the library that are made for them.
        """
        return len(kernel.steps) > 1 or kernel.reduced > 0 or (not has_out_form and len(kernel.domain) <= 1)


# Blocks of a kernel with reductions that keep the largest device busy; each takes a row, or neighbouring elements of 64 rows.
BUSY, WANTED, NEIGHBOURS = 132, 512, 64
# Elements of a row that a part must have at least: below, the parts themselves would be much to write.
LEAST_INNER, LEAST_OUTER = 1024, 32


def parts(rows: int, columns: int, inner: bool) -> int:
    """Into how many parts to cut each of so many rows, so that a reduction fills the device; 1: leave them whole.

    `inner`: neighbours in memory belong to one row.
    """
    blocks = rows if inner else -(-rows // NEIGHBOURS)
    if blocks >= BUSY:
        return 1
    return max(min(-(-WANTED // blocks), columns // (LEAST_INNER if inner else LEAST_OUTER)), 1)


def graph_micros(graph: Graph, rates: Rates) -> float:
    """Modelled time of a graph run op by op."""
    launches = sum(op.kind is not Kind.VIEW for op in graph.ops)
    return sum(op_micros(op, rates) for op in graph.ops) + launches * rates.launch_us
