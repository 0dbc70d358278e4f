"""From a Graph to the order, the streams and the costs of its Plan: passes, cost model, order."""

from kitsune.scheduler.awaited import awaited_first
from kitsune.scheduler.batch_norms import batch_norms
from kitsune.scheduler.bias_gradients import bias_gradients
from kitsune.scheduler.channels_last import in_channels_last
from kitsune.scheduler.cost import RATES, Costs, Load, Rates, graph_micros, kernel_micros, op_micros, parts
from kitsune.scheduler.cross_entropy import cross_entropies
from kitsune.scheduler.joining import joined_in_place
from kitsune.scheduler.made_again import made_again
from kitsune.scheduler.norms import layer_norm_backwards
from kitsune.scheduler.order import Work, in_order
from kitsune.scheduler.padding import padded_products
from kitsune.scheduler.pairs import Pair, Restoring, fleeting, prepared
from kitsune.scheduler.passes import dead_code, needed_ops, run_passes
from kitsune.scheduler.patches import patches_as_rows
from kitsune.scheduler.pools import pools
from kitsune.scheduler.split import split_reductions
from kitsune.scheduler.stream_config import StreamConfig
from kitsune.scheduler.streams import assign_streams
from kitsune.scheduler.subexpressions import common_subexpressions
from kitsune.scheduler.unlist import unlist

__all__ = [
    "RATES",
    "Costs",
    "Load",
    "Pair",
    "Rates",
    "Restoring",
    "StreamConfig",
    "Work",
    "assign_streams",
    "awaited_first",
    "batch_norms",
    "bias_gradients",
    "common_subexpressions",
    "cross_entropies",
    "dead_code",
    "fleeting",
    "graph_micros",
    "in_channels_last",
    "in_order",
    "joined_in_place",
    "kernel_micros",
    "layer_norm_backwards",
    "made_again",
    "needed_ops",
    "op_micros",
    "padded_products",
    "parts",
    "patches_as_rows",
    "pools",
    "prepared",
    "run_passes",
    "split_reductions",
    "unlist",
]
