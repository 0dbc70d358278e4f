"""Report: what was recorded, flushed, recognised and passed through, and why; and the time of steps."""

from kitsune.profiler.meter import StepMeter, speed, statistics_of
from kitsune.profiler.report import FlushLine, Numerics, NumericsLine, PassLine, PlanLine, RegionLine, Report, report
from kitsune.profiler.show import Show
from kitsune.profiler.summary import fusion_of, graph_of, summary_text, write_metrics
from kitsune.profiler.tally import PlanTally, Tally, plan_tally

__all__ = [
    "FlushLine",
    "Numerics",
    "NumericsLine",
    "PassLine",
    "PlanLine",
    "PlanTally",
    "RegionLine",
    "Report",
    "Show",
    "StepMeter",
    "Tally",
    "fusion_of",
    "graph_of",
    "plan_tally",
    "report",
    "speed",
    "statistics_of",
    "summary_text",
    "write_metrics",
]
