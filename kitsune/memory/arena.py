"""Where each storage lies in the arena: two share bytes only if every use of the one happens before the other is made."""

import bisect
from collections.abc import Sequence

from kitsune.memory.lifetimes import Lifetime

# What the allocator of CUDA memory aligns to; vector loads need 16.
ALIGNMENT = 512


def assign_offsets(lives: Sequence[Lifetime], before: Sequence[int]) -> tuple[dict[int, int], int]:
    """The first byte of each storage that is in the arena, and the arena's size.

    `before[k]` has the launches that have ended when launch k starts, as bits. Each storage, in the order of the launches that
    make them, gets the tightest gap between those that may still be in use.
    """
    offsets: dict[int, int] = {}
    ended = _ended_for_good(before)
    placed: list[tuple[int, int, int]] = []  # (offset, end, uses), by offset
    arena = 0
    for life in sorted((life for life in lives if life.in_arena), key=lambda life: life.first):
        size = max(1, -(-life.nbytes // ALIGNMENT)) * ALIGNMENT
        placed = [block for block in placed if block[2] & ~ended[life.first]]
        in_use = [block for block in placed if block[2] & ~before[life.first]]
        offset = _tightest_gap(in_use, size)
        offsets[life.storage] = offset
        bisect.insort(placed, (offset, offset + size, life.uses))
        arena = max(arena, offset + size)
    return offsets, arena


def _ended_for_good(before: Sequence[int]) -> list[int]:
    """For each launch the launches that have ended before it and before every later one, whatever their streams."""
    found, common = [], -1
    for mask in reversed(before):
        common &= mask
        found.append(common)
    return found[::-1]


def _tightest_gap(blocks: Sequence[tuple[int, int, int]], size: int) -> int:
    """The smallest gap between blocks, which are sorted and may overlap, that has room; else the end of the last."""
    best: tuple[int, int] | None = None
    end = 0
    for start, stop, _ in blocks:
        if start - end >= size and (best is None or start - end < best[0]):
            best = (start - end, end)
        end = max(end, stop)
    return end if best is None else best[1]
