"""What Kitsune predicts of results beside what calls give, in four layouts; `python -m tests.crossref` has all samples."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import kitsune
from kitsune import session
from kitsune.ir import OutputSpec
from kitsune.ir.tensor_type import tensor_type

pytest.importorskip("expecttest", reason="torch's operator database needs expecttest")

from tests import _opinfo, crossref

# Every so many-th entry; the command takes all.
EACH = 30


@pytest.mark.parametrize("name", _opinfo.names()[7::EACH])
def test_predictions_are_what_calls_give(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row = crossref.swept(name, most=1)
    assert row["equal"] == row["run"], row["told"]


def shifted(spec: OutputSpec, **changes: Any) -> OutputSpec:
    (type_, alias), *rest = spec.results
    fields = {name: getattr(type_, name) for name in ("dtype", "shape", "stride", "offset", "device", "conj", "neg")}
    return spec._replace(results=((tensor_type(**{**fields, **changes}), alias), *rest))


WRONG: dict[str, Callable[[OutputSpec], OutputSpec]] = {
    "strides": lambda spec: shifted(spec, stride=(1, 2)),
    "at 3": lambda spec: shifted(spec, offset=3),
    "memory": lambda spec: spec._replace(results=((spec.results[0][0], 0),)),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_prediction_is_told(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kitsune.reset()
    x = torch.ones(2, 3)
    with crossref.comparing() as reference:
        with kitsune.accelerate(warmup=0, device="cpu"):
            for pipeline in session.everyone:
                infer = pipeline.recorder.infer
                monkeypatch.setattr(pipeline.recorder, "infer", lambda *args, infer=infer: WRONG[what](infer(*args)))
            y = x.tanh()
        del y
    monkeypatch.undo()
    kitsune.reset()
    assert reference.compared == 1
    assert [what in told for told in reference.differences] == [True], reference.differences


def test_each_variant_is_another_layout_of_the_same_values() -> None:
    sample = next(_opinfo.samples("nn.functional.conv2d", "cpu", torch.float32))
    found = {name: crossref.laid_out(sample, name) for name in crossref.VARIANTS}
    assert found.pop("contiguous") is None, "it is, already"
    for name, other in found.items():
        pairs = list(zip(sample.tensors(), other.tensors(), strict=True))
        assert all(torch.equal(a, b) and a.requires_grad == b.requires_grad for a, b in pairs)
        assert any((a.stride(), a.storage_offset()) != (b.stride(), b.storage_offset()) for a, b in pairs), name
