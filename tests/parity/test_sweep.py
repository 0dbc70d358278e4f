"""One sample of each module, optimizer, user's function and custom operator, four times; and the sweep's own bookkeeping.

`make test-full` runs every sample of every dtype.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

import kitsune

pytest.importorskip("expecttest", reason="torch's databases need expecttest")

from tests import _moduleinfo, _opinfo
from tests.parity import expected, sights, sweep
from tests.parity.outcomes import differences, run

OTHERS = [*_opinfo.names(("function", "custom")), *_moduleinfo.modules(), *_moduleinfo.optimizers()]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    kitsune.reset()


@pytest.mark.parametrize("name", OTHERS)
def test_first_sample_is_as_in_eager(name: str) -> None:
    sample = next(sights.samples(name, torch.float32), None)
    if sample is None:
        pytest.skip("has no samples in float32")
    verdict = sights.four_sights(sample)
    assert not verdict.differences
    assert not verdict.unstable
    if name not in expected.LEFT_TO_EAGER:
        assert verdict.took_part in ("followed", "recorded")
    else:
        assert verdict.took_part not in ("followed", "recorded"), "takes part by now: take it out of the table"


@pytest.mark.parametrize("name", [name for name in _opinfo.names() if _opinfo.raises(name)])
def test_first_error_is_eagers(name: str) -> None:
    sample = next(_opinfo.error_samples(name, "cpu"), None)
    if sample is None:
        pytest.skip("has no errors on a CPU")
    assert not sights.raised_alike(sample).differences


@pytest.mark.parametrize("name", ["index_put", "linalg.solve", "nn.functional.layer_norm", "nn.functional.dropout", "sort"])
def test_what_vmap_calls_is_as_in_eager(name: str) -> None:
    sample = next(_opinfo.mapped_samples(name, "cpu"))
    verdict = sights.four_sights(sample)
    assert not verdict.differences and not verdict.unstable
    plain, mapped = (tree_leaves(it.fresh().call())[0] for it in (next(_opinfo.samples(name, "cpu", sample.dtype)), sample))
    assert mapped.shape == (2, *plain.shape)


@dataclasses.dataclass(frozen=True)
class Stale:
    """A sample that gives something else from the third sight on, as one of which a result of another step came back."""

    name: str = "stale"
    sights: list[bool] = dataclasses.field(default_factory=list)

    def fresh(self, moved: bool = False) -> Stale:
        return self

    def tensors(self) -> list[torch.Tensor]:
        return []

    def loss_of(self, outputs: Any) -> Any:
        return ()

    def call(self) -> torch.Tensor:
        result = torch.ones(3) + 1
        under_kitsune = type(result) is not torch.Tensor
        self.sights.extend([True] * under_kitsune)
        return result * 2 if under_kitsune and len(self.sights) > 2 else result * 1


def test_a_wrong_value_is_a_difference_and_at_the_sight_that_has_it() -> None:
    verdict = sights.four_sights(Stale())
    assert any(told.startswith("followed: outputs[0]: 3 of 3 elements differ") for told in verdict.differences)
    assert not any(told.startswith("observed") for told in verdict.differences)


def test_a_sample_that_reaches_no_operator_did_not_take_part() -> None:
    assert sights.four_sights(next(sights.samples("real", torch.int64))).took_part == "no operator"


def test_the_moved_sample_has_other_data_in_the_same_places() -> None:
    sample = next(_opinfo.samples("nn.functional.linear", "cpu", torch.float32))
    first, moved = sample.fresh().tensors()[0], sample.fresh(moved=True).tensors()[0]
    assert first.stride() == moved.stride()
    assert not torch.equal(first, moved)
    assert sorted(first.flatten().tolist()) == sorted(moved.flatten().tolist())
    assert list(differences(sample.name, run(sample.fresh(), nullcontext()), run(sample.fresh(moved=True), nullcontext())))


def test_a_process_that_dies_counts_as_crashed_and_the_parts_after_it_run(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sweep.swept

    def dies(name: str, part: str, most: int) -> sweep.Row:
        if part == "int64":
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(name, part, most)

    monkeypatch.setattr(sweep, "swept", dies)
    rows = sweep.in_a_process("neg", ["float32", "int64", "bool", "uint8"], most=1)
    assert [row["part"] for row in rows] == ["float32", "int64", "bool", "uint8"]
    assert [row["crashed"] for row in rows] == [0, 1, 0, 0]
    assert rows[0]["equal"] == rows[3]["equal"] == 1


def row(**changed: Any) -> sweep.Row:
    fields = {
        "entry": "neg",
        "part": "int64",
        "run": 4,
        "equal": 4,
        "different": 0,
        "crashed": 0,
        "told": [],
        "unstable": 0,
        "of_any_mode": 0,
        "left_out": 0,
        "why_left_out": {},
    }
    return {**fields, "took_part": {"followed": 4}, "seconds": 1.5, **changed}


def test_unexpected_differences_and_unexpected_passes_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = row(equal=3, different=1, told=["sample 2: outputs[0]: too large"])
    assert sweep.surprises(row()) == []
    assert sweep.surprises(wrong) == ["neg[int64]: sample 2: outputs[0]: too large"]
    monkeypatch.setitem(expected.EXPECTED, ("neg", "int64"), "a reason")
    assert sweep.surprises(wrong) == []
    assert "take it out of" in sweep.surprises(row())[0]
    assert sweep.surprises(row(left_out=7)) == [], "those may be the ones that differ"


def test_an_entry_that_is_left_to_eager_unexpectedly_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    left = row(took_part={"followed": 3, "ITEM": 1})
    assert sweep.surprises(left) == ["neg[int64]: 1 samples were left to eager: ITEM"]
    monkeypatch.setitem(expected.LEFT_TO_EAGER, "neg", "a reason")
    assert sweep.surprises(left) == []


def test_shards_are_merged_by_one_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / "sweep-1-of-2.jsonl", tmp_path / "sweep-2-of-2.jsonl"]
    files[0].write_text(json.dumps(row()) + "\n" + json.dumps(row(part="bool", run=1, equal=1)) + "\n")
    files[1].write_text(json.dumps(row(entry="abs")) + "\n")
    assert sweep.main(["--merge", *map(str, files)]) == 0
    printed = capsys.readouterr().out
    assert "2 entries; 0 lines above are unexpected" in printed
    lines = {line.split()[0]: line.split()[1:5] for line in printed.splitlines() if line.strip()}
    assert lines["int64"] == ["8", "8", "0", "0"]
    assert lines["all"] == ["9", "9", "0", "0"]


def test_shards_have_every_entry_once() -> None:
    everything = sweep.names()
    shards = [everything[k::4] for k in range(4)]
    assert sorted(name for shard in shards for name in shard) == sorted(everything)
    assert len(everything) > 800
