"""What the interpreter's accesses to memory are held against: a sample of the rules is clean, and broken kernels are told."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")


def rows(folder: Path, *options: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-W", "ignore", "-m", "tests.codegen.memory_check", str(folder), "--out", str(folder / "found")]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2])
    found = [json.loads(line) for line in (folder / "found").read_text().splitlines()]
    assert done.returncode == any(row["equal"] != row["run"] for row in found), done.stderr[-2000:]
    return found


def test_kernels_of_the_table_stay_inside_of_their_operands(tmp_path: Path) -> None:
    counts: Counter[str] = Counter()
    for row in rows(tmp_path, "--every", "40"):
        assert not row["told"]
        counts.update({name: row[name] for name in ("run", "equal")})
    assert counts["run"] == counts["equal"] > 100


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("index < n", "index <= n", {"outside: block 0 reads 1 elements", "outside: block 0 writes 1 elements"}),
        ("index < n", "index < n - 1", {"not written: 1 elements"}),
        ("tl.program_id(0)", "tl.program_id(0) * 0", {"race: two blocks write an element"}),
    ],
    ids=["beyond the end", "one too few", "the same block twice"],
)
def test_a_broken_kernel_is_told(old: str, new: str, told: set[str], tmp_path: Path) -> None:
    (row,) = [row for row in rows(tmp_path, "--only", "mish", "--replace", old, new) if row["part"] == "torch.float32"]
    assert row["different"] and told <= {words.partition(": ")[2] for words in row["told"]}
