"""Kernels against aten on the CPU, through Triton's interpreter: formulas, indices, masks and dtypes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kitsune.codegen.lowering import lower_rules
from tests.codegen.reductions import RULES
from tests.codegen.samples import SAMPLES

pytest.importorskip("triton")

# Rows under another name of the same formula, and of ops without operands.
SAMPLED_ELSEWHERE = (
    "alias lift_fresh_copy full new_full new_zeros new_ones zeros ones scalar_tensor subtract multiply divide true_divide "
    "negative absolute clip arcsin arccos arctan arctan2 fix special_erf special_expm1 special_exp2 special_xlogy __and__ __or__ "
    "__xor__ isfinite div.mode"
).split()


def test_every_rule_has_a_sample() -> None:
    missing = set(lower_rules) - {sample.rule for sample in SAMPLES} - set(SAMPLED_ELSEWHERE) - RULES
    assert not missing


@pytest.mark.timeout(300)
@pytest.mark.parametrize("what", ["ops", "shapes"])
def test_kernels_compute_what_aten_does(what: str, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.codegen.interpret", str(tmp_path), what]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not done.stdout, done.stdout[:4000]
