"""Report: what was recorded, flushed, recognised and passed through, and why."""

from kitsune.profiler.report import FlushLine, PassLine, PlanLine, RegionLine, Report, report
from kitsune.profiler.show import Show
from kitsune.profiler.tally import PlanTally, Tally, plan_tally

__all__ = ["FlushLine", "PassLine", "PlanLine", "PlanTally", "RegionLine", "Report", "Show", "Tally", "plan_tally", "report"]
