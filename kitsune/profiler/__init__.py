"""Report: what was recorded, flushed, recognised and passed through, and why."""

from kitsune.profiler.report import FlushLine, PassLine, RegionLine, Report, report
from kitsune.profiler.tally import Tally

__all__ = ["FlushLine", "PassLine", "RegionLine", "Report", "Tally", "report"]
