"""No kernel reads or writes outside of its tensors: every access to their memory has a mask, and each mask bounds what it must.

The interpreter reads whatever lies beyond the end of a tensor, so that it says nothing of this.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional as F

import kitsune.scheduler.cost
from kitsune.backends import program_of
from kitsune.planning import Planner
from kitsune.scheduler import RATES, Costs
from tests.corpus import FILES, load, name_of
from tests.plan.recorded import plan_of

STEPS = [path for path in FILES if name_of(path) in ("bert-small-amp-cpu", "demo-gpt-cpu", "lenet-small-fp32-cpu")]
STEPS += [path for path in FILES if name_of(path) in ("resnet18-small-amp-cpu", "mlp-small-amp-cpu")]
ACCESS = re.compile(r"tl\.(load|store)\((?:in|out)\d+ \+ .*")
# What a mask is, by the names of masks, and what else it may be.
WHOLE_TURNS = re.compile(r"for start in (tl\.)?range\(0, whole, RBLOCK\b")
MEANS = {
    "inside": {"index < n", "in_rows & in_columns"},
    "in_rows": {"row < rows"},
    "in_columns": {"column < columns"},
}
# In the loop over whole turns of a row, of which each is within it; the last turn has a loop of its own.
EVERYWHERE = "tl.full([1, RBLOCK], 1, tl.int1)"
WHOLE = "columns // RBLOCK * RBLOCK"
WINDOW = re.compile(r"inside & \(y >= 0\) & \(y < height\) & \(x >= 0\) & \(x < width\)( & .*)?")
PICKED = re.compile(r"in_rows & \((.*) >= 0\) & \(\1 < columns\)")


@pytest.fixture(scope="module")
def lines() -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kitsune.scheduler.cost, "WINDOW_BYTES", 0)
        planner = Planner(Costs(RATES["sm_90"]), numerics="strict")
        plans = [*(planner.plan(load(path)) for path in STEPS), plan_of(long_loss, numerics="strict")]
        launches = [launch for plan in plans for launch in plan.launches if launch.kernels]
        return [line.strip() for launch in launches for line in program_of(launch).text.splitlines()]


def long_loss() -> torch.Tensor:
    """Over rows that are read in a loop, of which one element each is picked."""
    return F.cross_entropy(torch.zeros(8, 20000), torch.arange(8))


def mask_of(call: str) -> str:
    """The mask of a call, whose text begins with it: as far as the parenthesis that ends it, or the next argument."""
    depth, start = 0, call.find("mask=")
    for k, letter in enumerate(call[start:], start):
        depth += (letter == "(") - (letter == ")")
        if depth < 0 or (letter == "," and not depth):
            return call[start + len("mask=") : k]
    return ""


def masks(lines: list[str]) -> Iterator[tuple[str, str]]:
    for line in lines:
        if access := ACCESS.search(line):
            yield line, mask_of(access.group()) if "mask=" in line else ""


def test_every_access_has_a_mask_that_bounds_it(lines: list[str]) -> None:
    counts: Counter[str] = Counter()
    for line, mask in masks(lines):
        assert mask in (*MEANS, "there") or PICKED.fullmatch(mask), line
        counts["picked" if PICKED.fullmatch(mask) else mask] += 1
    assert {*MEANS, "there", "picked"} <= set(counts), "of one kind there was none"


def test_masks_bound_what_they_are_named_after(lines: list[str]) -> None:
    loop = ""
    for line in lines:
        name, _, meaning = line.partition(" = ")
        loop = line if line.startswith("for ") else loop
        if meaning == EVERYWHERE:
            assert name == "in_columns" and WHOLE_TURNS.match(loop), "the last turn may be a part of one"
        else:
            assert name not in MEANS or meaning in MEANS[name], line
        assert name != "there" or WINDOW.fullmatch(meaning), line
        assert name != "whole" or meaning == WHOLE, line
