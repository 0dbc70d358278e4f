"""Random programs of exact operators on a GPU: kernels give the bits of replay, op by op.

    python -m tests.property.programs_cuda --shard 1/8 --out programs-1-of-8.jsonl

runs an eighth of 5,000 programs, each three times, with other numbers at last, by replay and by plan; every other one has each
operator as a kernel of its own. It prints how many were equal, and of those that were not the program and what differs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import tests.conftest  # noqa: F401  (its settings are those of the tests)

import pytest  # isort: skip
import torch
from hypothesis import Phase, given, seed, settings, strategies as st

import kitsune
from kitsune.config import config
from kitsune.scheduler import Costs
from tests.property.exact_steps import EXACT, begin
from tests.property.strategies import programs
from tests.property.test_executors import FUEL, on_gpu, other_numbers, run
from tests.property.test_programs import SLOW
from tests.property.world import Program, differences


def verdict(program: Program, alone: bool, fuel: int | None) -> tuple[str, list[str]]:
    """equal, different or crashed, and in which way."""
    kitsune.reset()
    with pytest.MonkeyPatch.context() as patch, config.patch(fuel=fuel):
        if alone:
            patch.setattr(Costs, "alone", lambda *_: True)
        try:
            for variant in (program, program, other_numbers(program)):
                if found := differences(run(variant, fuse=False), run(variant, fuse=True)):
                    return "different", found
        except Exception as error:
            return "crashed", [f"{type(error).__name__}: {error}"[:500]]
    mended = kitsune.explain().mended
    return ("different", list(map(str, mended))) if mended else ("equal", [])


def swept(shard: int, n_programs: int, on: str = "cuda") -> Counter[str]:
    """So many programs of a shard; no two shards begin with the same seed."""
    counts: Counter[str] = Counter()

    # A program that differs is told and counted, and the next one is drawn: nothing is to be shortened.
    @seed(shard)
    @settings(SLOW, max_examples=n_programs, database=None, phases=[Phase.generate], derandomize=False)
    @given(program=programs(16, EXACT, begin), alone=st.booleans(), fuel=FUEL)
    def check(program: Program, alone: bool, fuel: int | None) -> None:
        kind, told = verdict(on_gpu(program) if on == "cuda" else program, alone, fuel)
        counts.update(("run", kind))
        counts["kernels"] += kitsune.counters()["kernels"]
        if told:
            print(f"{kind}, alone={alone}, fuel={fuel}", *program.outside, *program.inside, *told[:3], sep="\n  ", flush=True)

    check()
    return counts


def main(given_: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shard", default="1/1")
    parser.add_argument("--programs", type=int, default=5000)
    parser.add_argument("--out", type=Path, help="write the counts to this file, as a line of JSON")
    options = parser.parse_args(given_)
    torch.backends.cuda.matmul.allow_tf32 = False
    k, n = map(int, options.shard.split("/"))
    counts = swept(k, -(-options.programs // n))
    print(f"programs {options.shard}:", ", ".join(f"{count} {name}" for name, count in counts.items()))
    if options.out:
        options.out.write_text(json.dumps({"shard": options.shard, **counts}) + "\n")
    return int(counts["equal"] != counts["run"] or not counts["kernels"])


if __name__ == "__main__":
    sys.exit(main())
