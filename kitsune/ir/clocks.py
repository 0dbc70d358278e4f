"""When the launches of a plan run, by vector clocks: how far each stream has come when a launch starts."""

from collections.abc import Sequence
from dataclasses import dataclass

from kitsune.ir.plan import Launch

Clock = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Clocks:
    """`stream[k]` and `turn[k]` say where launch k stands: the turn-th of its stream, from 1 on; 0 for one that starts nothing.

    `seen[k]` has, for each stream, how many of its launches have ended when launch k starts.
    """

    stream: tuple[int, ...]
    turn: tuple[int, ...]
    seen: tuple[Clock, ...]

    def ended(self, first: int, then: int) -> bool:
        """Has the one launch ended before the other starts? What starts nothing has always ended."""
        return self.turn[first] <= self.seen[then][self.stream[first]]


def clocks_of(launches: Sequence[Launch]) -> Clocks:
    """The clocks of launches in a plan's order. Raises ValueError for a wait that no event can end."""
    n = 1 + max((launch.stream for launch in launches), default=0)
    now: list[Clock] = [(0,) * n] * n
    turns: list[int] = []
    seen: list[Clock] = []
    for k, launch in enumerate(launches):
        if launch.stream < 0:
            raise ValueError(f"launch {k} ({launch.name}) is on stream {launch.stream}")
        clock = now[launch.stream]
        for awaited in launch.waits:
            if not 0 <= awaited < k or launches[awaited].host_only:
                raise ValueError(f"launch {k} ({launch.name}) waits for launch {awaited}, which no event before it ends")
            clock = tuple(map(max, clock, _after(seen[awaited], launches[awaited].stream, turns[awaited])))
        seen.append(clock)
        turns.append(0 if launch.host_only else 1 + clock[launch.stream])
        now[launch.stream] = _after(clock, launch.stream, turns[-1]) if turns[-1] else clock
    return Clocks(tuple(launch.stream for launch in launches), tuple(turns), tuple(seen))


def _after(clock: Clock, stream: int, turn: int) -> Clock:
    """What has ended once the launch with this turn has ended as well."""
    return (*clock[:stream], turn, *clock[stream + 1 :])
