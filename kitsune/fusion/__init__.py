"""Which ops become one kernel: legality, grouping, and the kernels that come of it; and what users say about it."""

from kitsune.fusion.batches import batch
from kitsune.fusion.config import FusionConfig
from kitsune.fusion.engine import FusedGroup, FusionEngine
from kitsune.fusion.gathering import gather
from kitsune.fusion.group import Group, why_not
from kitsune.fusion.grouping import Node, Partition, partition
from kitsune.fusion.kernels import as_kernel, in_long_rows, in_rows, kernels_of
from kitsune.fusion.patterns import FusionDetector, FusionPattern, FusionType, Match
from kitsune.fusion.rules import ANYTHING, MEASURED, Rules, benefit_key

__all__ = [
    "ANYTHING",
    "MEASURED",
    "FusedGroup",
    "FusionConfig",
    "FusionDetector",
    "FusionEngine",
    "FusionPattern",
    "FusionType",
    "Group",
    "Match",
    "Node",
    "Partition",
    "Rules",
    "as_kernel",
    "batch",
    "benefit_key",
    "gather",
    "in_long_rows",
    "in_rows",
    "kernels_of",
    "partition",
    "why_not",
]
