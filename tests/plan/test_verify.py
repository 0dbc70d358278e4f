"""`verify` refuses what is no graph: each rule with the smallest graph that breaks it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kitsune.ir import Effects, Graph, Kind, Op, Result, Value, default_type, verify

aten = torch.ops.aten
F2 = default_type(torch.float32, (2,))
X = Value(0, F2, storage=0)
Y = Value(1, F2, storage=1)
X1 = Value(2, F2, storage=0, version=1)
ADD = Op(aten.add.Tensor, Kind.POINTWISE, (X, 1), (), (X,), Result(0), (Y,))
WRITE = Op(aten.add_.Tensor, Kind.POINTWISE, (X, Y), (), (X, Y), None, (), ((X, X1),), Effects(writes=(0,)))
GOOD = Graph((X,), (ADD, WRITE), (Y, X1))


def test_a_graph_passes() -> None:
    verify(GOOD)


@pytest.mark.parametrize(
    ("graph", "says"),
    [
        (replace(GOOD, ops=(WRITE, ADD)), "reads .1, which is not defined before it"),
        (replace(GOOD, ops=(ADD, ADD)), "defines .1 twice"),
        (replace(GOOD, outputs=(Value(9, F2, 3),)), "returns .9, which it does not define"),
        (replace(GOOD, outputs=(Value(1, F2, storage=3),)), "returns .1 as Value.*storage=3.*made it as Value.*storage=1"),
        (replace(GOOD, ops=(ADD, replace(WRITE, effects=Effects()))), "does not declare what it writes"),
        (replace(GOOD, ops=(ADD, replace(WRITE, rewritten=((X, Value(2, F2, 5, 1)),)))), "to another storage"),
        (replace(GOOD, ops=(ADD, replace(WRITE, rewritten=((X, Value(2, F2, 0, 2)),)))), "writes version 2 of storage 0, not 1"),
    ],
)
def test_a_broken_graph_is_named(graph: Graph, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        verify(graph)
