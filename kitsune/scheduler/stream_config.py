"""`StreamConfig`: how many CUDA streams a step may use, and what each is for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kitsune.accepts import accepted, whole

MAX_STREAMS = 32
n_streams = whole(1, MAX_STREAMS)
ROLES = ("priority_streams", "compute_streams", "memory_streams")


@dataclass(frozen=True)
class StreamConfig:
    """Streams 0 to `num_streams - 1` (1 to 32, of which 4 to 8 are usual), and lists of those with a role.

    It is an upper bound: a plan uses as many as the cost model finds work for, in the CUDA graph of a step. The roles are
    checked (a stream is for work that computes or for work that moves memory, not for both; either may have priority) and kept,
    but the planner does not use them, which `kitsune.explain()` says too: it balances a wave's launches by their cost.
    """

    num_streams: int = 4
    priority_streams: list[int] = field(default_factory=list)
    compute_streams: list[int] = field(default_factory=list)
    memory_streams: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        accepted("num_streams", self.num_streams, n_streams)
        for role in ROLES:
            object.__setattr__(self, role, _indices(role, getattr(self, role), self.num_streams))
        both = sorted({*self.compute_streams} & {*self.memory_streams})
        if both:
            raise ValueError(
                f"compute_streams={self.compute_streams} and memory_streams={self.memory_streams} share {both}: "
                "a stream has one of the two roles. Only priority_streams may name streams of the others."
            )


def _indices(role: str, given: object, num_streams: int) -> list[int]:
    indices = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else None
    if indices is None or any(type(i) is not int or not 0 <= i < num_streams for i in indices):
        raise ValueError(
            f"{role}={given!r} is not possible: {role} accepts a list of stream numbers, which with "
            f"num_streams={num_streams} are 0 to {num_streams - 1}."
        )
    if len(set(indices)) < len(indices):
        raise ValueError(f"{role}={given!r} names a stream twice.")
    return indices
