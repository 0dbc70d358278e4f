"""When each storage lives, where it lies in the arena, and the pool that arenas come from."""

from kitsune.memory.arena import assign_offsets, peak_bytes
from kitsune.memory.lifetimes import Lifetime, lifetimes
from kitsune.memory.pool import Block, MemoryPool, PoolStatistics

__all__ = ["Block", "Lifetime", "MemoryPool", "PoolStatistics", "assign_offsets", "lifetimes", "peak_bytes"]
