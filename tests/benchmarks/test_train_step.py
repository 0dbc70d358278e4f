"""The benchmark of training steps runs on a CPU, says what is missing, and joins its pieces. No times are asserted."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.models import make, make_batches
from benchmarks.train_step import chart, rows, table
from benchmarks.train_step.columns import COLUMNS, NotAvailableError, Program
from benchmarks.train_step.worker import Stepper, Task, first_steps, steady_from

ROOT = Path(__file__).parent.parent.parent
CPU = torch.device("cpu")


def row(column: str, ms: float, losses: list[float], **more: Any) -> rows.Row:
    cold = {"first_step_s": 1.0, "steady_s": None, "first_ms": [ms] * len(losses), "losses": losses}
    key = {"size": "small", "precision": "fp32", "read": "every 20", "model": "mlp", "column": column}
    return {**key, "step_ms": ms, "quartiles_ms": [ms, ms], "cold": cold, **more}


@pytest.mark.timeout(300)
def test_two_columns_of_a_small_model_are_measured_and_kept(tmp_path: Path) -> None:
    target = tmp_path / "step.json"
    command = [sys.executable, "-m", "benchmarks.train_step", "--models", "mlp", "--columns", "eager,kitsune"]
    command += ["--device", "cpu", "--size", "small", "--precision", "fp32", "--no-warm", "--json", str(target)]
    done = subprocess.run([*command, "--samples", "2", "--first", "4"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    found = json.loads(target.read_text())
    assert [row["column"] for row in found["rows"]] == ["eager", "kitsune"]
    assert all("note" not in row and row["step_ms"] > 0 and len(row["cold"]["losses"]) == 4 for row in found["rows"])
    assert found["rows"][1]["losses_apart"] == 0.0


def test_the_static_column_skips_python_and_says_so() -> None:
    workload, batches = make("mlp", CPU, "fp32", "small", "fused"), make_batches("mlp", CPU, 2, "small")
    program = COLUMNS["kitsune-static"](workload, batches, "every 20")
    for _ in range(10):
        program.step(*batches[0])
    assert program.counts()["static_skipped"] > 0
    with pytest.raises(NotAvailableError, match="cannot stop"):
        COLUMNS["kitsune-static"](workload, batches, "each")


@pytest.mark.parametrize("column", ["graph", "graph-cl", "reduce-overhead", "compile-graph"])
def test_a_column_that_needs_cuda_says_so(column: str) -> None:
    with pytest.raises(NotAvailableError, match="CUDA"):
        COLUMNS[column](make("lenet", CPU, "fp32", "small"), make_batches("lenet", CPU, 2, "small"), "every 20")


def test_channels_last_needs_pictures() -> None:
    with pytest.raises(NotAvailableError, match="4 dimensions"):
        COLUMNS["graph-cl"](make("mlp", CPU, "fp32", "small"), make_batches("mlp", CPU, 2, "small"), "every 20")


def test_batches_differ_and_begin_with_the_workloads_own() -> None:
    first, second = make_batches("mlp", CPU, 2, "small")
    assert torch.equal(first[0], make("mlp", CPU, "fp32", "small").batch[0])
    assert not torch.equal(first[0], second[0])


def test_a_new_row_replaces_its_old_one_and_order_is_that_of_the_columns() -> None:
    old = [row("kitsune", 3.0, [1.0]), row("compile", 2.0, [1.0])]
    merged = rows.merge(old, [row("kitsune", 1.0, [1.5]), row("eager", 4.0, [1.0])])
    assert [(one["column"], one["step_ms"]) for one in merged] == [("eager", 4.0), ("compile", 2.0), ("kitsune", 1.0)]
    assert merged[2]["losses_apart"] == 0.5
    assert table.speed(merged, merged[2], "eager") == 4.0
    assert table.speed(merged, merged[2], "graph") is None


def test_results_of_another_device_are_not_joined(tmp_path: Path) -> None:
    target = tmp_path / "step.json"
    target.write_text(json.dumps({"environment": {"device": "abacus", "torch": "0"}, "rows": []}))
    with pytest.raises(ValueError, match="abacus"):
        rows.load_for_merging(target, CPU)


def test_a_failed_column_is_told() -> None:
    failed = {**row("compile", 1.0, [1.0]), "note": "failed: RuntimeError: no compiler"}
    del failed["step_ms"], failed["cold"]
    assert "mlp, compile: failed: RuntimeError: no compiler" in table.show([row("eager", 1.0, [1.0]), failed])


def test_one_slow_first_step_is_allowed_for_capture() -> None:
    assert table.slow_first_steps([10.0, 14.0, 60.0, 60.0, 100.0], [10.0] * 5) == [4, 5]


def test_steady_begins_after_the_last_slow_step() -> None:
    assert steady_from([900.0, 10.0, 50.0, 10.0, 11.0, 10.0]) == 3
    assert steady_from([10.0, 10.0, 10.0, 90.0]) is None
    assert steady_from([90.0, 17.0, 17.0, 17.0, 10.0, 17.0, 10.0, 10.0, 10.0, 10.0]) == 4


def test_the_chart_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    source = tmp_path / "step.json"
    missing = {**row("graph", 1.0, [1.0]), "note": "failed"}
    del missing["step_ms"]
    rows.keep(source, [row("eager", 2.0, [1.0]), missing, row("kitsune", 1.0, [1.0])], CPU)
    assert chart.draw(source, tmp_path / "step.png") == f"chart in {tmp_path / 'step.png'}"
    assert (tmp_path / "step.png").stat().st_size > 0


def test_steps_go_on_until_what_is_made_in_the_background_is_there() -> None:
    answers = [False, False, False, True]
    program = Program(lambda x, y: x.sum(), [(torch.ones(2), torch.ones(2))], is_ready=lambda: answers.pop(0))
    step = Stepper(program)
    found = first_steps(step, program, time.perf_counter(), Task("mlp", "kitsune", device="cpu", n_first=4))
    assert not answers and len(found["first_ms"]) == len(found["losses"]) == 4
