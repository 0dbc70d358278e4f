"""Which stream each launch goes to, and what it waits for there.

Launches that follow each other in the plan's order and do not need each other form a wave. Where running a wave at once is
modelled to be faster than one after the other, because a launch leaves a part of the device idle or is hardly more than its
start, its launches are spread over streams: the gradient of a weight runs beside that of its input. Every wave waits for the
one before, so that memory is given back nearly as early as on one stream.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from kitsune.ir import Graph, Kind, Launch, bits, predecessors
from kitsune.scheduler.cost import Load

# What it costs to fork and join once, in microseconds: two edges between branches of a graph.
FORK_US = 1.0
# The part of a wave's time that must be gained: kernels that each fill the device disturb each other (ResNet-50 took 1.2 %
# longer on an H200 where only the gaps between its launches were to be gained).
GAIN = 0.1
# Launches of one wave: more would hold memory for longer, and none was seen to fill the device less.
WIDEST = 8
# cuBLAS has a workspace of 32 MiB for each stream that it computes on: of a plan that needs little memory that would be most.
WORKSPACE = 32 << 20
WORTH_A_WORKSPACE = 64 * WORKSPACE


def assign_streams(
    launches: Sequence[Launch], graph: Graph, load_of: Callable[[Launch], Load], n_streams: int, nbytes: int
) -> tuple[Launch, ...]:
    """The launches, each with its stream and its waits; with one stream, as they are.

    `nbytes` is the memory that the plan is about to use: where it is little, matrix products stay on one stream.
    """
    assigned = list(launches)
    if n_streams < 2:
        return tuple(assigned)
    n_for_products = 2 if nbytes >= WORTH_A_WORKSPACE else 1
    # The last launch of each stream in the wave before.
    frontier: dict[int, int] = {}
    for wave in waves(launches, graph):
        streams = _spread([(k, launches[k], load_of(launches[k])) for k in wave], n_streams, n_for_products)
        last: dict[int, int] = {}
        for k in wave:
            stream = streams[k]
            waits = () if stream in last else tuple(sorted(n for other, n in frontier.items() if other != stream))
            assigned[k] = replace(launches[k], stream=stream, waits=waits)
            last[stream] = k
        frontier = last
    return tuple(assigned)


def waves(launches: Sequence[Launch], graph: Graph) -> Iterator[list[int]]:
    """Numbers of launches in a row of which none needs another one."""
    needs = _needs(launches, graph)
    wave: list[int] = []
    for k, launch in enumerate(launches):
        if launch.host_only:
            continue
        if wave and (len(wave) == WIDEST or not needs[k].isdisjoint(wave)):
            yield wave
            wave = []
        wave.append(k)
    if wave:
        yield wave


def _needs(launches: Sequence[Launch], graph: Graph) -> list[set[int]]:
    """The launches that each launch must come after."""
    numbers = {id(op): number for number, op in enumerate(graph.ops)}
    before = predecessors(graph)
    launched = {numbers[id(op)]: k for k, launch in enumerate(launches) for op in launch.ops if op.kind is not Kind.VIEW}
    return [
        {launched[n] for op in launch.ops if op.kind is not Kind.VIEW for n in bits(before[numbers[id(op)]])} - {k}
        for k, launch in enumerate(launches)
    ]


def _spread(wave: list[tuple[int, Launch, Load]], n_streams: int, n_for_products: int) -> dict[int, int]:
    """The stream of each launch of a wave, by number: products first, the longest of each first, each where it is done first."""
    alone = dict.fromkeys((k for k, _, _ in wave), 0)
    if len(wave) == 1:
        return alone
    found: dict[int, int] = {}
    busy = [0.0] * n_streams
    for k, launch, load in sorted(wave, key=lambda item: (not _is_product(item[1]), -item[2].micros, item[0])):
        choices = range(n_for_products if _is_product(launch) else n_streams)
        stream = min(choices, key=lambda s: (busy[s], s))
        found[k] = stream
        busy[stream] += load.micros
    together = max(*busy, sum(load.full for _, _, load in wave)) + FORK_US
    return found if together < (1 - GAIN) * sum(load.micros for _, _, load in wave) else alone


def _is_product(launch: Launch) -> bool:
    return launch.op is not None and launch.op.kind is Kind.GEMM
