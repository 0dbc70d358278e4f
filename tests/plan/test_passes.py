"""Rewrites of a graph before it is planned."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import kitsune
from kitsune.ir import verify
from kitsune.scheduler import common_subexpressions, dead_code, run_passes
from tests.plan.recorded import recorded_again as record


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    kitsune.reset()
    yield


def names(graph):
    return [op.target._opname for op in graph.ops]


def merged(program):
    graph = common_subexpressions(dead_code(record(program)))
    verify(graph)
    return names(graph)


def test_dead_code_is_dropped():
    x = torch.zeros(4)

    def program():
        y = x + 1
        z = y * 2
        del z
        return y

    assert names(dead_code(record(program))) == ["add"]


def test_a_write_to_an_input_is_never_dead():
    x = torch.zeros(4)
    assert names(dead_code(record(lambda: [x.add_(1)].clear()))) == ["add_"]


def test_equal_calls_are_made_once():
    x = torch.zeros(4)
    assert merged(lambda: (x + 1) * (x + 1)) == ["add", "mul"]


def test_equal_casts_of_one_view_are_made_once():
    x = torch.zeros(4, 4, requires_grad=True)
    with torch.no_grad():
        names = merged(lambda: ((y := x * 2).t().to(torch.bfloat16) @ y.t().to(torch.bfloat16)).sum())
    assert names == ["mul", "t", "_to_copy", "t", "mm", "sum"]


def test_a_write_between_keeps_both():
    x = torch.zeros(4)

    def program():
        a = x + 1
        x.mul_(2)
        return a * (x + 1)

    assert merged(program) == ["add", "mul_", "add", "mul"]


def test_results_that_both_live_on_keep_their_own_memory():
    x = torch.zeros(4)
    assert merged(lambda: (x + 1, x + 1)) == ["add", "add"]


def test_a_result_that_is_written_keeps_its_own_memory():
    x = torch.zeros(4)
    assert merged(lambda: (x + 1) * (x + 1).add_(1)) == ["add", "add", "add_", "mul"]


def test_random_numbers_are_drawn_as_often_as_asked_for():
    x = torch.full((4,), 0.5)
    assert merged(lambda: torch.bernoulli(x) + torch.bernoulli(x)) == ["bernoulli", "bernoulli", "add"]


def test_one_and_one_point_zero_and_true_are_different_constants():
    x = torch.zeros(4)
    assert merged(lambda: (x.clamp(1, 2), x.clamp(True, 2))).count("clamp") == 2


def test_the_runner_verifies_and_tells():
    heard = []
    graph = record(lambda: torch.zeros(4) + 1)
    run_passes(graph, (dead_code,), True, lambda name, graph, seconds: heard.append((name, len(graph.ops), seconds >= 0)))
    assert heard == [("dead_code", len(graph.ops), True)]


def test_complex_numbers_with_zeros_of_other_signs_differ():
    x = torch.zeros(4, dtype=torch.complex64)
    assert merged(lambda: ((x + complex(0.0, 0.0)) * 2, (x + complex(0.0, -0.0)) * 2)).count("add") == 2
