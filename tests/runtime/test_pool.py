"""The pool never lends one byte twice, wastes little, keeps little, and counts right."""

from __future__ import annotations

import itertools
import threading
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kitsune.memory.pool import MemoryPool, size_class

CPU = torch.device("cpu")
BUDGET = 20_000


class Lending(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.pool = MemoryPool(BUDGET)
        self.lent: list[tuple[Any, int]] = []
        # Kept by somebody else as well; and blocks that were, and may be there no more.
        self.shared: list[Any] = []
        self.left: list[weakref.ref[Any]] = []
        self.n_taken = 0

    @rule(nbytes=st.integers(0, 30_000), stream=st.integers(0, 1))
    def take(self, nbytes: int, stream: int) -> None:
        there = [b for b in self.shared if b.place[1] == stream and b.nbytes >= nbytes and not self.is_lent(b)]
        n_made = self.pool.statistics.misses
        block = self.pool.take(nbytes, CPU, stream)
        self.n_taken += 1
        assert not there or self.pool.statistics.misses == n_made
        assert block.tensor.dtype is torch.uint8
        assert block.tensor.numel() == block.nbytes >= nbytes
        assert block.address == block.tensor.data_ptr()
        assert block.address % 512 == 0
        block.tensor.fill_(self.n_taken % 251)
        self.lent.append((block, self.n_taken % 251))

    @precondition(lambda self: self.lent)
    @rule(k=st.integers(0, 1000))
    def give(self, k: int) -> None:
        block, mark = self.lent.pop(k % len(self.lent))
        assert bool((block.tensor == mark).all())
        self.pool.give(block)

    def is_lent(self, block: Any) -> bool:
        return any(block is other for other, _ in self.lent)

    @precondition(lambda self: self.lent)
    @rule(k=st.integers(0, 1000))
    def share(self, k: int) -> None:
        block, _ = self.lent[k % len(self.lent)]
        self.pool.share(block)
        if all(other is not block for other in self.shared):
            self.shared.append(block)

    @precondition(lambda self: self.shared)
    @rule(k=st.integers(0, 1000))
    def share_no_more(self, k: int) -> None:
        self.left.append(weakref.ref(self.shared.pop(k % len(self.shared))))

    @rule(budget=st.integers(0, BUDGET))
    def trim(self, budget: int) -> None:
        self.pool.trim(budget)
        told = self.pool.statistics
        assert told.held_bytes - told.used_bytes <= budget

    @rule()
    def free_all(self) -> None:
        self.pool.free_all()
        assert self.pool.statistics.held_bytes == self.pool.statistics.used_bytes
        there = [block for ref in self.left if (block := ref()) is not None]
        assert all(self.is_lent(block) or any(block is other for other in self.shared) for block in there)

    @invariant()
    def counts(self) -> None:
        told = self.pool.statistics
        assert told.used_bytes == sum(block.nbytes for block, _ in self.lent)
        assert told.held_bytes - told.used_bytes <= BUDGET
        assert told.hits + told.misses == self.n_taken

    @invariant()
    def apart(self) -> None:
        ranges = sorted((block.address, block.address + block.nbytes) for block, _ in self.lent)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ranges))


TestLending = Lending.TestCase


@settings(max_examples=300)
@given(st.integers(0, 1 << 40))
def test_a_size_class_wastes_an_eighth_at_most(nbytes: int) -> None:
    size = size_class(nbytes)
    assert size >= max(nbytes, 512)
    assert size % 512 == 0
    assert size - nbytes <= max(nbytes / 8, 512)
    assert size_class(size) == size


def test_a_block_comes_back_to_the_same_stream_only() -> None:
    pool = MemoryPool(1 << 20)
    block = pool.take(1000, CPU, 7)
    pool.give(block)
    assert pool.take(1000, CPU, 8) is not block
    assert pool.take(900, CPU, 7) is block
    assert (pool.statistics.hits, pool.statistics.misses) == (1, 2)


def test_a_large_block_wastes_two_mebibytes_at_most() -> None:
    assert size_class((1 << 31) + 1) == (1 << 31) + (2 << 20)


def test_one_block_serves_regions_of_all_sizes() -> None:
    pool = MemoryPool(1 << 30)
    for nbytes in (1000, 300_000, 20_000, 300_000, 1000):
        pool.give(pool.take(nbytes, CPU, 0))
    assert pool.statistics.held_bytes == size_class(300_000)
    assert (pool.statistics.hits, pool.statistics.misses) == (3, 2)


def test_room_is_made_for_a_block_that_is_larger_than_any_before_and_not_for_each() -> None:
    made: list[int] = []
    pool = MemoryPool(0, lambda device: made.append(pool.statistics.misses))
    # In MiB: small ones fit anywhere; a little more than before was in the same memory, as good as.
    for mib in (4, 16, 20, 24, 20, 30, 24, 32):
        pool.give(pool.take(mib << 20, CPU, 0))
    assert made == [3, 6]
    pool.give(pool.take(20 << 20, CPU, 1))
    assert made == [3, 6, 9]
    pool.give_way()
    pool.give(pool.take(18 << 20, CPU, 0))
    assert made == [3, 6, 9, 10]


def test_the_most_recently_used_are_kept() -> None:
    pool = MemoryPool(3 * 4096)
    blocks = [pool.take(4096, CPU, stream) for stream in range(5)]
    for block in blocks:
        pool.give(block)
    assert [pool.take(4096, CPU, stream) is block for stream, block in enumerate(blocks)] == [False, False, True, True, True]


def test_what_is_larger_than_the_budget_is_not_kept() -> None:
    pool = MemoryPool(4096)
    pool.give(pool.take(1 << 20, CPU, 0))
    assert pool.statistics.held_bytes == 0


def test_wrong_use_is_told() -> None:
    pool, other = MemoryPool(0), MemoryPool(0)
    block = pool.take(10, CPU, 0)
    with pytest.raises(ValueError, match="not on loan from this pool"):
        other.give(block)
    pool.give(block)
    with pytest.raises(ValueError, match="once"):
        pool.give(block)
    with pytest.raises(ValueError, match="budget"):
        MemoryPool(-1)
    with pytest.raises(ValueError, match="0 or more bytes"):
        size_class(-1)


def test_threads_do_not_get_each_others_blocks() -> None:
    pool, wrong = MemoryPool(1 << 16), []

    def work(mark: int) -> None:
        for _ in range(200):
            block = pool.take(2000, CPU, 0)
            block.tensor.fill_(mark)
            if not bool((block.tensor == mark).all()):
                wrong.append(mark)
            pool.give(block)

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert pool.statistics.used_bytes == 0
