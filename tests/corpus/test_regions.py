"""Regions of random programs: each is planned, and its kernels are written, as it was written down."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from kitsune.codegen.libdevice import writes_erf
from tests.corpus import regions

pytestmark = pytest.mark.skipif(not writes_erf(), reason="kernels call the library for the error function of this CUDA")
PARTS = 26


@cache
def lines() -> list[tuple[str, str]]:
    """What was written down of a region, and the region."""
    return list(zip(regions.EXPECTED.read_text().splitlines(), regions.texts(), strict=True))


def test_there_are_five_hundred_of_them_and_no_two_are_planned_alike() -> None:
    assert len({line for line, _ in lines()}) == len(lines()) >= 500


@pytest.mark.parametrize("part", range(PARTS))
def test_plans_and_kernels_are_those_that_were_written_down(part: int, record_property: Any) -> None:
    n_run, others = 0, []
    for number in range(part, len(lines()), PARTS):
        line, text = lines()[number]
        try:
            now = regions.line_of(regions.plan_of(text))
        except ValueError:  # an operator that this version of torch lacks
            continue
        n_run += 1
        if now != line:
            others.append(f"{number}: {now} instead of {line}")
    record_property("counts", [n_run, n_run - len(others), len(others), 0])
    assert not others, (
        f"{len(others)} of {n_run} are others; if they are to be: python -m tests.corpus.regions --accept\n{others}"
    )
