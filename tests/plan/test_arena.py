"""Offsets in the arena: nothing that is in use is shared, and little is wasted."""

from __future__ import annotations

from hypothesis import given, strategies as st

from kitsune.ir import Launch, happens_before
from kitsune.memory import Lifetime, assign_offsets
from kitsune.memory.arena import ALIGNMENT
from kitsune.memory.lifetimes import lifetimes
from tests.plan.test_verify_plan import CHAIN, kernel_of


def rounded(nbytes: int) -> int:
    return max(1, -(-nbytes // ALIGNMENT)) * ALIGNMENT


@st.composite
def lives(draw, n_launches: int = 24) -> list[Lifetime]:
    found = []
    for storage in range(draw(st.integers(0, 30))):
        first = draw(st.integers(0, n_launches - 1))
        last = draw(st.integers(first, n_launches - 1))
        uses = 1 << first | 1 << last
        found.append(Lifetime(storage, draw(st.integers(0, 100_000)), first, uses, draw(st.booleans())))
    return found


def ends(life: Lifetime) -> int:
    return life.uses.bit_length() - 1


@given(lives())
def test_storages_that_are_in_use_together_share_no_byte(lives):
    before = happens_before([Launch()] * 24)
    offsets, arena = assign_offsets(lives, before)
    ours = [life for life in lives if life.storage in offsets]
    assert all(life.in_arena for life in ours)
    for a in ours:
        assert offsets[a.storage] % ALIGNMENT == 0
        assert offsets[a.storage] + a.nbytes <= arena
        for b in ours:
            together = a.first <= ends(b) and b.first <= ends(a)
            apart = (
                offsets[a.storage] + rounded(a.nbytes) <= offsets[b.storage]
                or offsets[b.storage] + rounded(b.nbytes) <= offsets[a.storage]
            )
            assert a is b or not together or apart


@given(lives())
def test_launches_on_two_streams_share_only_what_an_event_orders(lives):
    launches = [Launch(stream=k % 2, waits=(k - 1,) if k % 6 == 5 else ()) for k in range(24)]
    before = happens_before(launches)
    offsets, _ = assign_offsets(lives, before)
    ours = [life for life in lives if life.storage in offsets]
    for a in ours:
        for b in ours:
            ordered = not a.uses & ~before[b.first] or not b.uses & ~before[a.first]
            apart = (
                offsets[a.storage] + rounded(a.nbytes) <= offsets[b.storage]
                or offsets[b.storage] + rounded(b.nbytes) <= offsets[a.storage]
            )
            assert a is b or ordered or apart


def bytes_in_use(lives: list[Lifetime], k: int) -> int:
    return sum(rounded(life.nbytes) for life in lives if life.nbytes and life.first <= k <= ends(life))


@given(lives())
def test_the_arena_is_no_larger_than_what_lives_in_it_at_the_worst_moment(lives):
    _, arena = assign_offsets(lives, happens_before([Launch()] * 24))
    assert arena <= max(bytes_in_use([x for x in lives if x.in_arena], k) for k in range(24)) if lives else arena == 0


@given(lives())
def test_the_arena_does_not_add_to_the_peak(lives):
    offsets, arena = assign_offsets(lives, happens_before([Launch()] * 24))
    elsewhere = [life for life in lives if life.storage not in offsets]
    for k in range(24):
        assert arena + bytes_in_use(elsewhere, k) <= 1.01 * max(bytes_in_use(lives, j) for j in range(24))


def test_an_arena_that_stands_empty_beside_a_large_result_is_made_smaller():
    early = Lifetime(0, 8192, 0, 0b11, False)
    late = [Lifetime(k, 4096, 5, 1 << 5 | 1 << 6, True) for k in (1, 2, 3)]
    offsets, arena = assign_offsets([early, *late], happens_before([Launch()] * 8))
    assert arena <= 4096 and len(offsets) <= 1


def test_what_would_make_the_arena_larger_has_memory_of_its_own():
    early = Lifetime(0, 10_000, 0, 0b11, False)
    then = Lifetime(1, 4096, 0, 0b11, True)
    late = Lifetime(2, 8192, 5, 1 << 5 | 1 << 6, True)
    small = Lifetime(3, 4096, 5, 1 << 5 | 1 << 6, True)
    offsets, arena = assign_offsets([early, then, late, small], happens_before([Launch()] * 8))
    assert arena == 4096 and offsets == {1: 0, 3: 0}


def test_a_chain_needs_two_buffers():
    lives = [Lifetime(k, 1000, k, 0b11 << k, True) for k in range(20)]
    _, arena = assign_offsets(lives, happens_before([Launch()] * 21))
    assert arena == 2 * 1024


def test_kernels_have_places_in_the_arena_and_library_calls_where_they_can_be_given_memory() -> None:
    by_kernels = [Launch((kernel_of(op),)) for op in CHAIN.ops]
    by_library = [Launch(op=op) for op in CHAIN.ops]
    for launches, takes, ours in ((by_kernels, False, True), (by_library, False, False), (by_library, True, True)):
        found = {life.storage: life.in_arena for life in lifetimes(CHAIN, launches, lambda op, takes=takes: takes)}
        # The last one is the program's.
        assert found == {1: ours, 2: ours, 3: False}


def test_happens_before_follows_streams_and_waits():
    launches = [Launch(stream=0), Launch(stream=1), Launch(stream=1, waits=(0,)), Launch(stream=0)]
    assert happens_before(launches) == [0b0000, 0b0000, 0b0011, 0b0001]
