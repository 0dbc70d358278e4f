"""The check of runs against eager: what differs, at which operator and line, and a file that shows it again."""

from kitsune.checking.check import checked_run, reporting
from kitsune.checking.findings import CheckReport, Difference
from kitsune.checking.reproduction import reproduce

__all__ = ["CheckReport", "Difference", "checked_run", "reporting", "reproduce"]
