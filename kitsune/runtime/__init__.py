"""Run: executors of closed regions and of their plans."""

from kitsune.runtime.out_forms import out_form
from kitsune.runtime.plan_executor import PlanExecutor, Prepared
from kitsune.runtime.replay import Schedule, prepare, replay

__all__ = ["PlanExecutor", "Prepared", "Schedule", "out_form", "prepare", "replay"]
