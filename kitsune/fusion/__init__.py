"""Which ops become one kernel: legality, grouping, and the kernels that come of it."""

from kitsune.fusion.batches import batch
from kitsune.fusion.group import Group, why_not
from kitsune.fusion.grouping import Node, Partition, partition
from kitsune.fusion.kernels import as_kernel, kernels_of

__all__ = ["Group", "Node", "Partition", "as_kernel", "batch", "kernels_of", "partition", "why_not"]
