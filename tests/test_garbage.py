"""While a context is open, the garbage collector is not set off by objects of Kitsune's."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import kitsune
from kitsune.contexts import threshold
from kitsune.garbage import AFTER, LATEST, OBJECTS, OPENINGS, SELDOM
from tests.runtime.repeated import graphs


@pytest.fixture(autouse=True)
def usual() -> Iterator[None]:
    before = gc.get_threshold()
    gc.set_threshold(700, 10, 10)
    # Other tests have opened many contexts.
    threshold._n_openings, threshold._before, threshold.owes_look = 0, None, False
    yield
    gc.set_threshold(*before)


def test_it_is_as_before_when_the_last_context_is_left() -> None:
    with kitsune.accelerate(device="cpu"):
        with kitsune.accelerate(device="cpu"):
            assert gc.get_threshold() == (AFTER, 10, SELDOM)
        assert gc.get_threshold() == (AFTER, 10, SELDOM)
    assert gc.get_threshold() == (700, 10, 10)


def in_steps(n: int) -> None:
    for _ in range(n):
        with kitsune.accelerate(device="cpu"):
            pass


def test_between_contexts_that_come_and_go_it_stays() -> None:
    in_steps(OPENINGS - 1)
    assert gc.get_threshold() == (700, 10, 10)
    in_steps(1)
    assert gc.get_threshold() == (AFTER, 10, SELDOM)
    gc.collect(0)
    in_steps(1)
    gc.collect(0)
    assert gc.get_threshold() == (AFTER, 10, SELDOM), "there was a context since the collection before"
    gc.collect(0)
    assert gc.get_threshold() == (700, 10, 10)
    in_steps(1)
    assert gc.get_threshold() == (AFTER, 10, SELDOM)


def test_inside_of_a_context_no_number_of_collections_changes_it() -> None:
    in_steps(OPENINGS)
    with kitsune.accelerate(device="cpu"):
        for _ in range(3):
            gc.collect(0)
        assert gc.get_threshold() == (AFTER, 10, SELDOM)


def test_what_the_program_sets_between_contexts_stays() -> None:
    in_steps(OPENINGS)
    gc.set_threshold(500, 5, 5)
    in_steps(1)
    for _ in range(2):
        gc.collect(0)
    assert gc.get_threshold() == (500, 5, 5)


@pytest.mark.parametrize("first", [0, AFTER + 1])
def test_a_program_that_is_more_patient_itself_is_left_alone(first: int) -> None:
    gc.set_threshold(first, 10, 10)
    with kitsune.accelerate(device="cpu"):
        assert gc.get_threshold() == (first, 10, 10)
    assert gc.get_threshold() == (first, 10, 10)


def test_what_the_program_sets_meanwhile_stays() -> None:
    with kitsune.accelerate(device="cpu"):
        gc.set_threshold(500, 5, 5)
    assert gc.get_threshold() == (500, 5, 5)


def test_a_program_that_looks_at_all_more_seldom_still_does() -> None:
    gc.set_threshold(700, 10, 10 * SELDOM)
    with kitsune.accelerate(device="cpu"):
        assert gc.get_threshold() == (AFTER, 10, 10 * SELDOM)
    assert gc.get_threshold() == (700, 10, 10 * SELDOM)


def test_steps_set_off_no_collection_for_objects_that_die_anyway() -> None:
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(150)])
    optimizer, x = torch.optim.SGD(model.parameters(), lr=0.1), torch.ones(4, 8)

    def steps(n: int) -> None:
        for _ in range(n):
            model(x).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    seen: list[int] = []

    def hear(phase: str, info: dict[str, int]) -> None:
        seen.extend([info["generation"]] if phase == "start" else [])

    gc.callbacks.append(hear)
    with contextlib.ExitStack() as stack:
        stack.callback(gc.callbacks.remove, hear)
        with kitsune.accelerate(device="cpu"):
            steps(8)
            seen.clear()
            steps(60)
            few = len(seen)
            # As it would be without, at a lower threshold than Python's, since few of its objects are new in each step.
            gc.set_threshold(200, 10, 10)
            seen.clear()
            steps(60)
            assert few <= 1 < len(seen)


def test_cycles_are_collected_in_the_end() -> None:
    class Node:
        pass

    with kitsune.accelerate(device="cpu"):
        node = Node()
        node.self = node  # type: ignore[attr-defined]
        gone = weakref.ref(node)
        del node
        kept = [[] for _ in range(2 * AFTER)]  # type: ignore[var-annotated]
        assert gone() is None and kept


def collections_of(n_steps: int, sizes: tuple[int, ...] = (4,)) -> list[list[int]]:
    """The generations that were collected in each of the first steps of a program with 900 operators a step."""
    kitsune.reset()
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(150)])
    optimizer, batches = torch.optim.SGD(model.parameters(), lr=0.1), [torch.ones(n, 8) for n in sizes]
    seen: list[int] = []

    def hear(phase: str, info: dict[str, int]) -> None:
        if phase == "stop":
            seen.append(info["generation"])

    found = []
    gc.callbacks.append(hear)
    try:
        with kitsune.accelerate(device="cpu"):
            gc.collect()
            for k in range(n_steps):
                seen.clear()
                model(batches[k % len(batches)]).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
                found.append(list(seen))
                assert threshold.owes_look or gc.get_threshold()[0] in (0, AFTER), "from then on all is counted"
    finally:
        gc.callbacks.remove(hear)
    return found


def test_what_a_first_step_teaches_sets_off_nothing_and_is_old_some_regions_later() -> None:
    assert collections_of(LATEST + 3) == [[]] * LATEST + [[1], [], []]


def test_it_is_looked_at_behind_a_capture() -> None:
    with graphs(kernels=False), kitsune.config.patch(gate=False):
        found = collections_of(LATEST + 3)
        assert kitsune.counters()["captured"] == 1
    assert found == [[], [], [1], *[[]] * LATEST]


def test_a_program_whose_regions_are_all_new_is_looked_at_as_well() -> None:
    n = 2 * LATEST + 2
    found = collections_of(n, sizes=(*range(1, n + 1),))
    assert [1 in generations for generations in found] == ([False] * LATEST + [True]) * 2


def test_where_the_program_has_it_switched_off_there_is_no_look() -> None:
    gc.disable()
    try:
        assert collections_of(LATEST + 2) == [[]] * (LATEST + 2)
    finally:
        gc.enable()


def test_objects_of_the_program_are_counted_as_before_meanwhile() -> None:
    kitsune.reset()
    layers = [nn.Linear(8, 8) for _ in range(150)]
    seen: list[int] = []
    x, kept = torch.ones(4, 8), []
    with kitsune.accelerate(device="cpu"):
        gc.collect()
        gc.callbacks.append(lambda phase, info: seen.append(info["generation"]))
        try:
            for layer in layers:
                x = layer(x)
            assert not seen and gc.get_threshold()[0] > AFTER and threshold.owes_look
            kept += [[] for _ in range(AFTER + 450 * OBJECTS)]
            assert seen
        finally:
            gc.callbacks.pop()
    assert not threshold.owes_look, "it is made up for when the context is left"


def test_what_the_program_sets_while_it_learns_stays() -> None:
    kitsune.reset()
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(150)])
    with kitsune.accelerate(device="cpu"):
        model(torch.ones(4, 8))
        gc.set_threshold(123_456, 7, 7)
        model(torch.ones(4, 8)).sum().backward()
        assert gc.get_threshold() == (123_456, 7, 7)
    assert gc.get_threshold() == (123_456, 7, 7)
