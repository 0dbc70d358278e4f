"""Every kernel that the recorded steps of the full models need compiles, by whichever Triton is there."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from kitsune.backends import program_of
from kitsune.codegen import Compiler
from kitsune.codegen.machine_code import machine_code
from kitsune.ir import load_graph
from kitsune.planning import Planner
from kitsune.scheduler import RATES, Costs

pytest.importorskip("triton")
CORPUS = Path(__file__).parent.parent / "corpus"
FULL = sorted(path.name.partition(".")[0] for path in CORPUS.glob("*-full-*.gz"))


@pytest.mark.parametrize("name", FULL)
def test_with_reductions_all_kernels_of_a_step_compile(name: str, tmp_path: Path) -> None:
    """As a CUDA graph starts them, and aligned: what does not compile so has another variant take its place, or the library."""
    try:
        graph = load_graph(gzip.decompress((CORPUS / f"{name}.jsonl.gz").read_bytes()).decode())
    except ValueError as error:
        pytest.skip(str(error))
    plan = Planner(Costs(RATES["sm_90"]), numerics="strict", slots_in_kernels=True).plan(graph)
    compiler, failed = Compiler(tmp_path), []
    programs = {(p.text, p.tile): p for p in (program_of(launch, True) for launch in plan.launches if launch.kernels)}
    for program in programs.values():
        try:
            machine_code(compiler.job_of(program, 90, 16, False))
        except Exception as error:
            failed.append((program.name, program.tile, f"{type(error).__name__}: {str(error)[:200]}"))
    assert programs and not failed
