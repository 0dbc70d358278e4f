"""Where each storage lies in the arena: two share bytes only if every use of the one happens before the other is made."""

import itertools
from collections.abc import Sequence

from kitsune.memory.lifetimes import Lifetime

# What the allocator of CUDA memory aligns to; vector loads need 16.
ALIGNMENT = 512
# The part of the peak that an arena may add to it. With none, a few bytes that lie idle next to the worst moment forbid it.
SLACK = 100
# Sizes of the arena that are tried: each halves what is not known of the best.
TRIES = 4


def assign_offsets(lives: Sequence[Lifetime], before: Sequence[int]) -> tuple[dict[int, int], int]:
    """The first byte of each storage that lies in the arena, and the arena's size.

    `before[k]` has the launches that have ended when launch k starts, as bits. The arena is held from the first launch to the
    last, so that a byte of it that nobody uses adds to what is made elsewhere at that moment. It is therefore no larger than
    what it holds at the moment when most memory is in use, and made smaller until the peak rises by a hundredth at most. What
    does not fit has memory of its own.
    """
    ours = [life for life in lives if life.in_arena and life.nbytes]
    conflicts = _conflicts(ours, before)
    in_use = _in_use(lives, len(before))
    peak = max(in_use, default=0)
    worst = in_use.index(peak) if in_use else 0
    # Of those in use at the worst moment, which are stacked, the longest-lived come first: they fill the arena at others too.
    order = sorted(range(len(ours)), key=lambda k: _rank(ours[k], worst))
    low, high = 0, sum(_rounded(life.nbytes) for life in ours if _lives_at(life, worst))
    best: tuple[dict[int, int], int] = ({}, 0)
    limit = high
    for _ in range(TRIES):
        offsets, arena = _pack(ours, conflicts, order, limit)
        elsewhere = _in_use([life for life in lives if life.storage not in offsets], len(before))
        if arena + max(elsewhere, default=0) <= peak + peak // SLACK:
            best, low = (offsets, arena), limit
        else:
            high = limit
        if high - low <= ALIGNMENT or low == limit == high:
            break
        limit = (low + high) // 2 // ALIGNMENT * ALIGNMENT
    return best


def peak_bytes(lives: Sequence[Lifetime], n_launches: int) -> int:
    """Bytes in use during the launch when most are."""
    return max(_in_use(lives, n_launches), default=0)


def _rank(life: Lifetime, worst: int) -> tuple[int, int, int]:
    if _lives_at(life, worst):
        return (0, life.first - life.uses.bit_length(), -life.nbytes)
    return (1, -life.nbytes, life.first)


def _pack(
    lives: Sequence[Lifetime], conflicts: Sequence[Sequence[int]], order: Sequence[int], limit: int
) -> tuple[dict[int, int], int]:
    """Offsets below `limit` for as many storages as find room in this order, each as low as it can lie."""
    placed: dict[int, tuple[int, int]] = {}
    for k in order:
        size = _rounded(lives[k].nbytes)
        offset = _lowest_gap(sorted([placed[other] for other in conflicts[k] if other in placed]), size)
        if offset + size <= limit:
            placed[k] = (offset, offset + size)
    return {lives[k].storage: offset for k, (offset, _) in placed.items()}, max((end for _, end in placed.values()), default=0)


def _lives_at(life: Lifetime, k: int) -> bool:
    return life.first <= k < life.uses.bit_length()


def _in_use(lives: Sequence[Lifetime], n_launches: int) -> list[int]:
    """Bytes in use during each launch."""
    change = [0] * (n_launches + 1)
    for life in lives:
        change[life.first] += _rounded(life.nbytes)
        change[life.uses.bit_length()] -= _rounded(life.nbytes)
    return list(itertools.accumulate(change[:-1]))


def _rounded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _conflicts(lives: Sequence[Lifetime], before: Sequence[int]) -> list[list[int]]:
    """For each storage those that may be in use at the same time."""
    ended = _ended_for_good(before)
    found: list[list[int]] = [[] for _ in lives]
    active: list[int] = []
    for k in sorted(range(len(lives)), key=lambda k: lives[k].first):
        first = lives[k].first
        active = [other for other in active if lives[other].uses & ~ended[first]]
        for other in active:
            if lives[other].uses & ~before[first]:
                found[k].append(other)
                found[other].append(k)
        active.append(k)
    return found


def _ended_for_good(before: Sequence[int]) -> list[int]:
    """For each launch the launches that have ended before it and before every later one, whatever their streams."""
    found, common = [], -1
    for mask in reversed(before):
        common &= mask
        found.append(common)
    return found[::-1]


def _lowest_gap(blocks: Sequence[tuple[int, int]], size: int) -> int:
    """The first offset with room between blocks, which are sorted and may overlap."""
    end = 0
    for start, stop in blocks:
        if start - end >= size:
            return end
        if stop > end:
            end = stop
    return end
