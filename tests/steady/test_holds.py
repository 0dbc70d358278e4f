"""Counts of references tell what the program holds of calls, as long as the calls themselves refer to the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kitsune.ir import type_of
from kitsune.lazy import LazyTensor
from kitsune.lazy.cell import Cell, ref
from kitsune.lazy.holds import Holds
from kitsune.lazy.tensor import wrap


def made() -> LazyTensor:
    return wrap(Cell(None, ref(0), type_of(torch.zeros(2)), -1))


def call(args: Any, result: Any, flat: Any = None, kwargs: Any = None) -> Any:
    return None, args, kwargs, list(args if flat is None else flat), (result,), 0


def three(a: Any, b: Any, second: Any) -> list[Any]:
    """The third is given what the first two have made."""
    return [call((), a), call((), b), call(second, made())]


def apart(calls: list[Any], *left: int) -> list[Any]:
    return [call((), "gone") if k in left else one for k, one in enumerate(calls)]


def sure(calls: list[Any], *left: int) -> Holds:
    holds = Holds(calls)
    holds.found(apart(calls, *left))
    assert holds.is_sure
    return holds


def left(holds: Holds, calls: list[Any]) -> list[int] | None:
    """The places of what is left, if it is known. (What an assertion looks at it holds for a while.)"""
    found = holds.left_again(calls)
    return None if found is None else [k for k, one in enumerate(calls) for t in found if t is one[4][0]]


def test_what_nobody_held_is_left_again() -> None:
    a, b = made(), made()
    holds = sure(three(a, b, (a, b)), 0, 2)
    calls = three(a, b, (a, b))
    assert left(holds, calls) == [0, 2]
    held = [a]
    assert left(holds, calls) is None
    held.clear()
    assert left(holds, calls) == [0, 2]
    del b
    assert left(holds, calls) is None


def test_calls_that_refer_to_others_are_not_known() -> None:
    a, b = made(), made()
    held = [b, b]
    holds = sure(three(a, b, (a, b)), 0)
    calls = three(a, b, (b, b))
    # In two places less by the calls, and in two more by somebody else.
    held[:] = [a, a]
    assert left(holds, calls) is None
    held[:] = [b, b]
    calls = three(a, b, (a, b))
    assert left(holds, calls) == [0]


def test_what_they_were_given_it_in_is_theirs_alone() -> None:
    given = [(made(), made())]
    calls = three(*given[0], given[0])
    assert not Holds(calls).is_sure
    given.clear()
    holds = sure(calls, 0)
    assert left(holds, calls) == [0]
    given.append(calls[2][1])
    assert left(holds, calls) is None


@pytest.mark.parametrize("way", ["a list", "a list in a tuple", "an option"])
def test_so_are_lists_and_options_in_it(way: str) -> None:
    first = made()
    given: list[Any] = [{"first": first} if way == "an option" else [first]]
    args = {"a list": (given[0],), "a list in a tuple": ((3, given[0]),), "an option": ()}[way]
    calls = [call(args, made(), [first], given[0] if way == "an option" else None)]
    del first, args
    assert not Holds(calls).is_sure
    given.clear()
    assert Holds(calls).is_sure


def test_calls_that_were_taken_apart_are_not_known() -> None:
    calls = three(made(), made(), ())
    holds = sure(calls, 1)
    assert left(holds, apart(calls, 1)) is None
    assert not Holds(apart(calls, 1)).is_sure
