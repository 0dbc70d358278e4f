"""Run: executors of closed regions and of their plans, and their replay as CUDA graphs."""

from kitsune.runtime.answers import Answers
from kitsune.runtime.capturable import GraphFacts
from kitsune.runtime.captured import Captured, NotCaptured, Work
from kitsune.runtime.cuda_graph import CudaGraphs, GraphRecorder
from kitsune.runtime.graph_work import Arenas, plan_work, schedule_work
from kitsune.runtime.idle import asked_bytes, give_back, has_room, was_lent, would_rise
from kitsune.runtime.lent_outputs import adopt_views, views_of_inputs
from kitsune.runtime.numeric_settings import library_switches, numeric_settings
from kitsune.runtime.out_forms import out_form, takes_memory
from kitsune.runtime.page_reader import PageReader
from kitsune.runtime.plan_executor import PlanExecutor, Prepared
from kitsune.runtime.replay import Schedule, prepare, replay
from kitsune.runtime.slots import SlotTable
from kitsune.runtime.steady import SteadyState
from kitsune.runtime.steady_region import Steady
from kitsune.runtime.thread_plans import ThreadPlans
from kitsune.runtime.timing import device_seconds, in_turn
from kitsune.runtime.trials import Timer, Trial

__all__ = [
    "Answers",
    "Arenas",
    "Captured",
    "CudaGraphs",
    "GraphFacts",
    "GraphRecorder",
    "NotCaptured",
    "PageReader",
    "PlanExecutor",
    "Prepared",
    "Schedule",
    "SlotTable",
    "Steady",
    "SteadyState",
    "ThreadPlans",
    "Timer",
    "Trial",
    "Work",
    "adopt_views",
    "asked_bytes",
    "device_seconds",
    "give_back",
    "has_room",
    "in_turn",
    "library_switches",
    "numeric_settings",
    "out_form",
    "plan_work",
    "prepare",
    "replay",
    "schedule_work",
    "takes_memory",
    "views_of_inputs",
    "was_lent",
    "would_rise",
]
