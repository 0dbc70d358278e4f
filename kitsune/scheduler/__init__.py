"""From a Graph to the order, the streams and the costs of its Plan: passes, cost model, order."""

from kitsune.scheduler.cost import RATES, Costs, Load, Rates, graph_micros, kernel_micros, op_micros
from kitsune.scheduler.order import Work, in_order
from kitsune.scheduler.passes import dead_code, needed_ops, run_passes
from kitsune.scheduler.stream_config import StreamConfig
from kitsune.scheduler.streams import assign_streams
from kitsune.scheduler.subexpressions import common_subexpressions
from kitsune.scheduler.unlist import unlist

__all__ = [
    "RATES",
    "Costs",
    "Load",
    "Rates",
    "StreamConfig",
    "Work",
    "assign_streams",
    "common_subexpressions",
    "dead_code",
    "graph_micros",
    "in_order",
    "kernel_micros",
    "needed_ops",
    "op_micros",
    "run_passes",
    "unlist",
]
