"""Where the variant for aligned addresses cannot be compiled, the one for any addresses takes its place, from then on at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kitsune.codegen import machine_code as module
from kitsune.codegen.machine_code import Job, machine_code


def job(path: Path, aligned: bool = True) -> Job:
    return Job(str(path / "kernel.py"), "kernel", False, aligned, False, 90, None)


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """A compiler that breaks off at aligned operands; lists what it was asked for."""
    found: list[bool] = []

    def compiled(job: Job) -> Any:
        found.append(job.aligned)
        if job.aligned:
            raise RuntimeError("PassManager::run failed")
        return "machine code"

    monkeypatch.setattr(module, "_machine_code", compiled)
    return found


def test_the_other_variant_is_made_and_the_failure_remembered(tried: list[bool], tmp_path: Path) -> None:
    assert machine_code(job(tmp_path)) == "machine code"
    assert machine_code(job(tmp_path)) == "machine code"
    assert tried == [True, False, False]


def test_a_folder_that_cannot_be_written_only_costs_another_try(tried: list[bool], tmp_path: Path) -> None:
    for _ in range(2):
        assert machine_code(job(tmp_path / "missing")) == "machine code"
    assert tried == [True, False, True, False]


def test_a_kernel_that_fails_in_both_variants_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(job: Job) -> Any:
        raise RuntimeError(f"aligned: {job.aligned}")

    monkeypatch.setattr(module, "_machine_code", fail)
    with pytest.raises(RuntimeError, match="aligned: False"):
        machine_code(job(tmp_path))
