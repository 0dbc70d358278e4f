"""Every file of the corpus can be read, is consistent, and is a step that was recorded from end to end."""

from __future__ import annotations

from pathlib import Path

import pytest

from kitsune.ir import Kind, verify
from kitsune.ir.serial import dump_graph
from tests.corpus import FILES, load, name_of, text_of

MODELS = ("mlp", "lenet", "resnet18", "resnet50", "vit", "bert", "gpt2")


def test_each_model_is_there_in_both_precisions() -> None:
    names = {name_of(path) for path in FILES}
    assert names >= {f"{model}-small-{precision}-cpu" for model in MODELS for precision in ("amp", "fp32")}
    assert names >= {"demo-lenet-cpu", "demo-gpt-cpu"}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_reads_as_it_was_written(path: Path) -> None:
    graph = load(path)
    verify(graph)
    assert dump_graph(graph) == text_of(path)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_holds_a_whole_training_step(path: Path) -> None:
    graph = load(path)
    kinds = {op.kind for op in graph.ops}
    assert {Kind.POINTWISE, Kind.REDUCTION, Kind.VIEW, Kind.GEMM} <= kinds
    assert graph.outputs, "an observed region has no outputs: its operators have run already"
    assert any("backward" in str(op.target) for op in graph.ops)
    parameters = {v.storage for v in graph.inputs}
    assert any(storage in parameters for op in graph.ops for storage in op.effects.writes), "the optimizer writes parameters"
