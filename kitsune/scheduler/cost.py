"""What a launch is thought to take. Only a matter of speed: any numbers here give the same results."""

import math
from dataclasses import dataclass

from kitsune.ir import Graph, Kernel, Kind, Launch, Op, touched_bytes


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
        n = touched_bytes(access, kernel.domain)
        scattered = bool(kernel.domain) and access.strides[-1] > 1
        moved += n * (min(SECTOR, access.strides[-1] * itemsize) / itemsize if scattered else 1)
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


# Started together, small kernels save their launches; large ones fill the device alone, and would only hold memory longer.
BATCH_BELOW_US = 50.0


@dataclass(frozen=True, slots=True)
class Costs:
    """What pays, on a device with these rates. Every answer of these three is correct; some are fast."""

    rates: Rates

    def joining(self, saved_bytes: int, saved_launches: int) -> bool:
        """Does it pay that an op joins a kernel?"""
        return saved_bytes / self.rates.bytes_per_us + saved_launches * self.rates.launch_us > 0

    def load(self, launch: Launch) -> Load:
        """What a launch asks of the device, by its modelled time."""
        body = max(launch.micros - self.rates.launch_us, 0.0)
        return Load(self.rates.launch_us + body / max(_share(launch, self.rates), SMALLEST_SHARE), body)

    def batching(self, kernel: Kernel) -> bool:
        """Does it pay to start a kernel together with others of its source?"""
        return kernel_micros(kernel, self.rates) < BATCH_BELOW_US

    def alone(self, kernel: Kernel, has_out_form: bool) -> bool:
        """Does a kernel that is in no batch beat the library?

        With one op only it moves the same bytes, and must be compiled. But the plan can give it memory, which a cast, for one,
        takes from nobody; walks that jump through memory are left to kernels of the library that are made for them.
        """
        return len(kernel.steps) > 1 or (not has_out_form and len(kernel.domain) <= 1)


def graph_micros(graph: Graph, rates: Rates) -> float:
    """Modelled time of a graph run op by op."""
    launches = sum(op.kind is not Kind.VIEW for op in graph.ops)
    return sum(op_micros(op, rates) for op in graph.ops) + launches * rates.launch_us
