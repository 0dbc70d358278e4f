"""Record: wrappers without storage, the region in progress, regions seen before, and the doors that end a region."""

from kitsune.lazy.by_doors import ByDoors
from kitsune.lazy.call_lane import CallLane
from kitsune.lazy.casts import casts_down, outlive_calls
from kitsune.lazy.cell import serial_of
from kitsune.lazy.doors import close_doors, open_doors
from kitsune.lazy.early_reads import memory_changed
from kitsune.lazy.graph_doors import close_graph_doors, open_graph_doors
from kitsune.lazy.host_counts import HostCounts, count_steps, numbers_of, read_steps
from kitsune.lazy.paused import Paused
from kitsune.lazy.realize import attach_spent, settle_spent
from kitsune.lazy.recorder import Recorder
from kitsune.lazy.recorders import in_a_step, renew_lock, where_in_step
from kitsune.lazy.region import is_strided
from kitsune.lazy.replaced import REPLACED_BEFORE
from kitsune.lazy.scalar_sources import ScalarSources
from kitsune.lazy.settle import settle_grads, settle_state
from kitsune.lazy.shield import record_shielded
from kitsune.lazy.sites import user_site
from kitsune.lazy.tensor import LazyTensor, as_plain
from kitsune.lazy.used_again import keep

__all__ = [
    "REPLACED_BEFORE",
    "ByDoors",
    "CallLane",
    "HostCounts",
    "LazyTensor",
    "Paused",
    "Recorder",
    "ScalarSources",
    "as_plain",
    "attach_spent",
    "casts_down",
    "close_doors",
    "close_graph_doors",
    "count_steps",
    "in_a_step",
    "is_strided",
    "keep",
    "memory_changed",
    "numbers_of",
    "open_doors",
    "open_graph_doors",
    "outlive_calls",
    "read_steps",
    "record_shielded",
    "renew_lock",
    "serial_of",
    "settle_grads",
    "settle_spent",
    "settle_state",
    "user_site",
    "where_in_step",
]
