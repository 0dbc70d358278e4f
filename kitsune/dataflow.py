"""`DataflowScheduler`: from a recorded region to its plan, and over how many streams."""

from __future__ import annotations

from kitsune.fusion import ANYTHING, Rules
from kitsune.ir import Graph, Plan
from kitsune.pipeline import planned_for, tally
from kitsune.scheduler import StreamConfig


class DataflowScheduler:
    """Plans recorded regions: order by dependence and cost, streams, memory.

    `num_streams` (or a `StreamConfig`, which wins) is an upper bound. Launches that do not need each other are spread over
    streams where the cost model says that one alone leaves the device idle, as branches of the CUDA graph of a step.
    `streams_used` says what the plans that have run use.
    """

    def __init__(self, num_streams: int = 4, stream_config: StreamConfig | None = None, rules: Rules = ANYTHING) -> None:
        self.stream_config = stream_config or StreamConfig(num_streams)
        self._rules = rules

    @property
    def num_streams(self) -> int:
        """How many streams a plan may use."""
        return self.stream_config.num_streams

    @property
    def streams_used(self) -> int | None:
        """How many streams the plans use that have run since the last `kitsune.reset()`; None if none has."""
        streams = {launch.stream for one in tally.plans for launch in one.plan.launches if not launch.host_only}
        return len(streams) or None

    def schedule(self, graph: Graph, arch: str | None = None) -> Plan:
        """The plan of a region for a GPU, sm_80 or sm_90: by default the one that is here and, without one, sm_90."""
        if not isinstance(graph, Graph):
            raise TypeError(f"schedule() takes a kitsune.ir.Graph, as regions are recorded, not {type(graph).__name__}.")
        return planned_for(graph, arch, self._rules, self.num_streams)

    def __repr__(self) -> str:
        return f"DataflowScheduler(num_streams={self.num_streams}, streams_used={self.streams_used})"


def streams_note(config: StreamConfig) -> str:
    """What `explain()` says of the roles that a `StreamConfig` gives to streams; nothing if it gives none."""
    if not (config.priority_streams or config.compute_streams or config.memory_streams):
        return ""
    return (
        f"the roles in {config} are not used: which of its {config.num_streams} streams a launch is on, and all at one priority, "
        "is the planner's decision"
    )
