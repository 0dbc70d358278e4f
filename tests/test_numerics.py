"""`kitsune.explain(numerics=True)`: every op that may differ has a row, and those of the last plan are counted."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.nn import functional as F

import kitsune
from kitsune.codegen import UNROUNDED, base_name, differences
from kitsune.codegen.exactness import ASKED_OTHERWISE, DISTANCE, FORMULAS, REDUCTIONS
from kitsune.codegen.render import _rendered
from kitsune.ir import Graph, Kind, Plan
from kitsune.ir.reductions import _RULES as REDUCED
from kitsune.numerics import made_otherwise
from kitsune.planning import Planner
from kitsune.scheduler import RATES, Costs
from kitsune.scheduler.formats import ROWS
from tests.codegen.build import build
from tests.plan.test_corpus_plans import CORPUS, graph_of


def planned(name: str, numerics: str, layouts: bool = True) -> tuple[Graph, Plan]:
    graph = graph_of(CORPUS / f"{name}.jsonl.gz")
    return graph, Planner(Costs(RATES["sm_90"]), numerics=numerics, layouts=layouts).plan(graph)


def recorded(graph: Graph, name: str) -> int:
    return sum(base_name(op) == name for op in graph.ops)


def names(numerics: str, toolkit: bool = True) -> set[str]:
    return {one.op for one in differences(numerics, toolkit)}


def test_every_reduction_that_a_kernel_does_and_every_op_that_is_laid_out_has_a_row() -> None:
    assert REDUCED.keys() <= REDUCTIONS.keys()
    # Pooling by the largest picks the same number in any layout.
    assert ROWS.keys() - {"max_pool2d_with_indices"} <= REDUCTIONS.keys() | ASKED_OTHERWISE.keys()


def test_a_grade_has_what_stricter_ones_have_and_more() -> None:
    assert names("bitwise") == FORMULAS.keys()
    assert names("bitwise") < names("strict") < names("fast") < names("fast", toolkit=False)
    assert "argmax" not in names("strict") and "sum" in names("strict")
    assert DISTANCE.keys() | {UNROUNDED, "_fused_adam_"} <= names("fast") - names("strict")


@pytest.mark.parametrize(("version", "known"), [("13.0", True), ("12.8", False), (None, True)])
def test_gelu_wants_a_toolkit_only_of_a_cuda_whose_error_function_is_not_written_out(
    version: str | None, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", version)
    kernel = build(F.gelu, [torch.zeros(64)], "k").kernel
    assert ("libdevice.erf(" in _rendered(kernel, False, False).text) is not known
    assert ("gelu" in names("fast", toolkit=False)) is not known and "gelu" not in names("fast")
    assert "erfc" in names("fast", toolkit=False)


def test_of_gpt2_all_norms_are_made_otherwise_and_of_its_products_those_that_are_padded() -> None:
    graph, plan = planned("gpt2-full-amp-cuda", "strict")
    found = made_otherwise(graph, plan)
    for op in ("native_layer_norm", "native_layer_norm_backward", "_log_softmax", "_log_softmax_backward_data"):
        assert found[op] == recorded(graph, op) > 0, op
    # Forward, and the gradients of both operands, of the vocabulary.
    assert found["mm"] + found["addmm"] == 3 < recorded(graph, "mm")
    assert not found[UNROUNDED]


def test_of_resnet_the_convolutions_are_made_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not made_otherwise(*planned("resnet18-small-amp-cuda", "fast"))["convolution"], "they are small"
    monkeypatch.setattr(Costs, "channels_last", lambda *_: True)
    graph, plan = planned("resnet18-small-amp-cuda", "fast")
    found = made_otherwise(graph, plan)
    assert found["convolution"] and found["convolution_backward"] and found["mean"] == recorded(graph, "mean") > 0
    assert found[UNROUNDED] > 0


def test_what_differs_in_a_plan_of_the_bitwise_grade_is_pointwise() -> None:
    graph, plan = planned("gpt2-small-amp-cuda", "bitwise", layouts=False)
    kinds = {base_name(op): op.kind for op in graph.ops}
    made = {name for name, n in made_otherwise(graph, plan).items() if n}
    # Of the library's those alone that only fill memory.
    assert made and {kinds[one] for one in made - {"full", "zeros", "ones", "scalar_tensor"}} <= {Kind.POINTWISE, Kind.VIEW}


@pytest.mark.parametrize("name", ["bert-small-amp-cuda", "vit-small-amp-cuda", "resnet18-small-amp-cuda", "lenet-small-fp32-cpu"])
def test_what_differs_in_a_strict_plan_has_a_row(name: str) -> None:
    graph, plan = planned(name, "strict")
    kinds = {base_name(op): op.kind for op in graph.ops}
    made = {one for one, n in made_otherwise(graph, plan).items() if n and kinds.get(one) in (Kind.REDUCTION, Kind.GEMM)}
    assert made and made <= names("strict")


def test_explain_lists_them_with_the_grade_of_the_last_region() -> None:
    kitsune.reset()
    x = torch.randn(64, 1000)
    for _ in range(2):
        with kitsune.config.patch(numerics="strict"), kitsune.accelerate(warmup=0, device="cpu"):
            x.mean(1)  # which nobody needs
            twice = x * 2
            y = (F.softmax(twice, 1) + F.softmax(twice, 1)).sum(0)
    report = kitsune.explain(numerics=True)
    assert report.numerics is not None and report.numerics.grade == "strict"
    counted = Counter({line.op: line.in_last_plan for line in report.numerics.lines})
    assert counted["_softmax"] == counted["sum"] == 1 and not counted["mean"]
    text = str(report)
    assert "numerics='strict'" in text and "_softmax" in text and "1 x in the last plan" in text
    assert report.numerics.lines[0].in_last_plan == 1, "the most frequent come first"
    assert report.to_dict()["numerics"]["grade"] == "strict"
    assert kitsune.explain().numerics is None and "may differ" not in str(kitsune.explain())
    assert y.shape == (1000,)


def test_before_any_region_it_is_the_knobs_grade() -> None:
    kitsune.reset()
    for grade in ("bitwise", "fast"):
        with kitsune.config.patch(numerics=grade):
            told = kitsune.explain(numerics=True).numerics
        assert told is not None and told.grade == grade
        assert {line.op for line in told.lines} >= names("bitwise") and not any(line.in_last_plan for line in told.lines)
