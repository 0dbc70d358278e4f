"""The tool that makes mutants: what it changes, that the tree stays as it is, and that a verdict is what the tests say."""

from __future__ import annotations

import ast
import json
from collections import Counter
from pathlib import Path

import pytest

from tests.mutants import run
from tests.mutants.equivalent import EQUIVALENT
from tests.mutants.mutate import ROOT, all_mutants, chosen, mutants_of

SOURCE = '''"""Words: 1 < 2."""
TABLE = {"a", "b"}


def widest(sizes, mask):
    """At most 3."""
    if not sizes:
        return 0
    found = max(sizes[1:])
    found += 1
    return found if found <= 8 and mask else f"tl.load(x + {found}, mask={mask}) < tl.float32"
'''


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("kitsune", "tests", "benchmarks"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
    for name in ("pyproject.toml", "README.md", "Makefile"):
        (tmp_path / name).write_text("")
    (tmp_path / "kitsune" / "wide.py").write_text(SOURCE)
    said = "from kitsune.wide import widest\n\n\ndef test_widest():\n    assert widest([0, 2], True) == 3\n"
    (tmp_path / "tests" / "test_wide.py").write_text(said)
    monkeypatch.setattr(run, "ROOT", tmp_path)
    return tmp_path


def test_each_kind_of_mistake_is_made_and_nothing_that_is_only_said(tree: Path) -> None:
    found = {(m.kind, m.before.strip(), m.after) for m in mutants_of(tree / "kitsune" / "wide.py", tree)}
    assert {
        ("lost element", '{"a", "b"}', "({'b'})"),
        ("removed guard", "not sizes", "False"),
        ("dropped not", "not sizes", "(sizes)"),
        ("off by one", "0", "1"),
        ("min for max, any for all", "max(sizes[1:])", "(min(sizes[1:]))"),
        ("dropped statement", "found += 1", "pass"),
        ("other comparison", "found <= 8", "(found < 8)"),
        ("and for or", "found <= 8 and mask", "(found <= 8 or mask)"),
    } <= found
    kinds = Counter(kind for kind, _, _ in found)
    assert kinds["skipped mask in a kernel"] == kinds["swapped cast in a kernel"] == kinds["other comparison in a kernel"] == 1
    assert not any("Words" in before or "At most" in before for _, before, _ in found)


def test_every_mutant_of_the_planner_is_a_program_and_has_a_key_of_its_own() -> None:
    mutants = all_mutants()
    assert len(mutants) > 5000
    assert len({m.key for m in mutants}) == len(mutants)
    sources = {path: (ROOT / path).read_text() for path in {m.path for m in mutants}}
    for mutant in chosen(mutants, 60, seed=3):
        changed = mutant.applied(sources[mutant.path])
        assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(sources[mutant.path])), mutant.key


def test_a_choice_stays_when_other_mutants_come_and_go() -> None:
    mutants = all_mutants()
    first = chosen(mutants, 330, seed=1)
    assert {m.kind for m in first} == {m.kind for m in mutants}
    left = [m for m in mutants if m not in first[:10]]
    assert len({m.key for m in first[10:]} - {m.key for m in chosen(left, 330, seed=1)}) == 0


def test_verdicts_are_those_of_the_tests_and_the_tree_stays(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    copy = run.Copy(tmp_path_factory.mktemp("copy"))
    by_change = {m.after: m for m in mutants_of(tree / "kitsune" / "wide.py", tree)}
    tests = ["tests/test_wide.py::test_widest"]
    assert copy.verdict(None, tests, 60) == ("survived", "")
    assert copy.verdict(by_change["pass"], tests, 60) == ("killed", tests[0])
    assert copy.verdict(by_change["({'b'})"], tests, 60) == ("survived", "")
    assert copy.verdict(by_change["pass"], tests, 0) == ("timed out", "")
    assert (tree / "kitsune" / "wide.py").read_text() == (copy.folder / "kitsune" / "wide.py").read_text() == SOURCE


def row(name: str, verdict: str) -> str:
    fields = {"mutant": name, "kind": "off by one", "path": "p", "line": 1, "by": "", "tests": 1, "seconds": 1.0}
    return json.dumps({**fields, "verdict": verdict}) + "\n"


@pytest.mark.parametrize(("n_survived", "status"), [(1, 0), (2, 1)])
def test_fewer_than_95_of_100_fail(n_survived: int, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verdicts = ["killed"] * 18 + ["timed out"] + ["equivalent"] + ["survived"] * n_survived
    file = tmp_path / "mutants.jsonl"
    file.write_text("".join(row(str(k), verdict) for k, verdict in enumerate(verdicts)))
    assert run.main(["--merge", str(file)]) == status
    assert f"19 of {19 + n_survived} mutants are found" in capsys.readouterr().out


def test_equivalent_ones_are_there_and_have_reasons() -> None:
    assert not set(EQUIVALENT) - {m.key for m in all_mutants()}, "the code has changed: take them out, or write them anew"
    assert all(len(reason) > 20 for reason in EQUIVALENT.values())
