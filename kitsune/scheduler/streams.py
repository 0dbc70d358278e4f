"""Which stream each launch goes to, and what it waits for there. One stream for now: the order is the list's."""

from collections.abc import Sequence

from kitsune.ir import Launch


def assign_streams(launches: Sequence[Launch]) -> tuple[Launch, ...]:
    """Every launch on stream 0, which needs no waits."""
    return tuple(launches)


def happens_before(launches: Sequence[Launch]) -> list[int]:
    """For each launch the launches that have ended before it starts, as bits: those earlier on its stream and those that it
    waits for, with all that came before them."""
    last: dict[int, int] = {}
    found: list[int] = []
    for k, launch in enumerate(launches):
        mask = 0
        for n in (*launch.waits, *([last[launch.stream]] if launch.stream in last else ())):
            mask |= found[n] | 1 << n
        found.append(mask)
        last[launch.stream] = k
    return found
