"""Record: wrappers without storage, the region in progress, regions seen before, and the doors that end a region."""

from kitsune.lazy.call_lane import CallLane
from kitsune.lazy.doors import close_doors, open_doors
from kitsune.lazy.graph_doors import close_graph_doors, open_graph_doors
from kitsune.lazy.recorder import Recorder
from kitsune.lazy.settle import settle_grads, settle_state
from kitsune.lazy.tensor import LazyTensor, as_plain

__all__ = [
    "CallLane",
    "LazyTensor",
    "Recorder",
    "as_plain",
    "close_doors",
    "close_graph_doors",
    "open_doors",
    "open_graph_doors",
    "settle_grads",
    "settle_state",
]
