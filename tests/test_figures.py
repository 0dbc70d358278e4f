"""The table of figures counts what result files hold, and says "not run" of the rest."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from tests import figures
from tests.parity.expected import EXPECTED

JUNIT = """<testsuites><testsuite>
  <properties><property name="hypothesis-statistics-tests/property/test_programs.py::test_lazy" value="STATISTICS"/></properties>
  <testcase classname="tests.golden.test_kernels" name="test_kernel[cast]"/>
  <testcase classname="tests.golden.test_kernels" name="test_kernel[mask]"><failure/></testcase>
  <testcase classname="tests.golden.test_kernels" name="test_kernel[gpu]"><skipped/></testcase>
  <testcase classname="tests.chaos.test_threads" name="test_two"><error/></testcase>
  <testcase classname="tests.chaos.test_long" name="test_sizes">
    <properties><property name="counts" value="[7, 6, 1, 0]"/></properties><failure/></testcase>
  <testcase file="tests/property/test_programs.py" classname="any" name="test_lazy"/>
</testsuite></testsuites>""".replace(
    "STATISTICS", base64.b64encode(b"- 9 passing, 0 failing, 3 invalid\n- 200 passing, 0 failing").decode()
)
ROW = {"entry": "add", "part": "int64", "run": 5, "equal": 3, "different": 2, "crashed": 0, "left_out": 7}
PLANS = {"graphs": 2, "plans": 4, "needed": 5, "caught": 5, "spare": 1, "implied": 2, "wrong": 1}
MUTANTS = [
    {"mutant": name, "verdict": verdict}
    for name, verdict in (("a", "survived"), ("a", "killed"), ("b", "timed out"), ("c", "survived"), ("d", "equivalent"))
]


def lines(folder: Path) -> dict[str, list[str]]:
    """The columns of each row that has run, by the words that it begins with."""
    files = sorted(folder.iterdir())
    rows = figures.table(figures.read(files)).splitlines()
    return {row[:74].strip(): row[74:].split() for row in rows}


def test_outcomes_of_tests_are_counted_by_anchor(tmp_path: Path) -> None:
    (tmp_path / "tests-cpu.xml").write_text(JUNIT)
    found = lines(tmp_path)
    assert found["16      text of kernels, as it was written down"] == ["2", "1", "1", "0", "0", "1", "40", "fewer"]
    assert found["chaos   threads"] == ["1", "0", "0", "1", "0", "0"]
    assert found["chaos   compiled modules"] == ["not", "run"]
    assert figures.main([str(tmp_path / "tests-cpu.xml")]) == 1


def test_tests_that_count_and_examples_of_hypothesis_are_counted(tmp_path: Path) -> None:
    (tmp_path / "tests-cpu.xml").write_text(JUNIT)
    found = lines(tmp_path)
    assert found["chaos   100,000 operators, 10,000 layers, 1,000 batch sizes"] == "7 6 1 0 0 0".split()
    assert found["14      random programs, by replay and by plan"] == "209 209 0 0 0 0 400 fewer".split()


def test_of_two_runs_the_one_that_counts_more_is_shown(tmp_path: Path) -> None:
    few = JUNIT.replace("<failure/>", "").replace("[7, 6, 1, 0]", "[7, 7, 0, 0]")
    (tmp_path / "tests-cpu.xml").write_text(few)
    (tmp_path / "tests-of-chaos.xml").write_text(few.replace("[7, 7, 0, 0]", "[70, 70, 0, 0]"))
    assert lines(tmp_path)["chaos   100,000 operators, 10,000 layers, 1,000 batch sizes"] == "70 70 0 0 0 0".split()


def test_what_fails_once_is_no_success(tmp_path: Path) -> None:
    whole = JUNIT.replace("<failure/>", "").replace("[7, 6, 1, 0]", "[70, 70, 0, 0]")
    for names in ("ab", "ba"):
        for name, text in zip(names, (JUNIT, whole), strict=True):
            (tmp_path / f"tests-{name}.xml").write_text(text)
        assert lines(tmp_path)["chaos   100,000 operators, 10,000 layers, 1,000 batch sizes"] == "7 6 1 0 0 0".split()


def test_of_two_sweeps_of_an_entry_the_last_counts(tmp_path: Path) -> None:
    (tmp_path / "sweep-1-of-2.jsonl").write_text(json.dumps(ROW))
    (tmp_path / "sweep-again.jsonl").write_text(json.dumps({**ROW, "equal": 5, "different": 0}))
    assert lines(tmp_path)["1       every sample of every operator, eight dtypes, on the CPU"] == "5 5 0 0 0 7".split()


def test_what_one_machine_skips_another_may_run(tmp_path: Path) -> None:
    (tmp_path / "tests-cpu.xml").write_text(JUNIT)
    (tmp_path / "tests-gpu.xml").write_text(JUNIT.replace("<skipped/>", ""))
    assert lines(tmp_path)["16      text of kernels, as it was written down"] == "3 2 1 0 0 0 40 fewer".split()


@pytest.fixture
def one_is_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXPECTED, ("prod", "float16"), "a reason")


@pytest.mark.usefixtures("one_is_expected")
def test_sweeps_are_added_up_and_expected_differences_are_told_apart(tmp_path: Path) -> None:
    expected = {**ROW, "entry": "prod", "part": "float16", "equal": 4, "different": 1}
    (tmp_path / "sweep-1-of-2.jsonl").write_text(json.dumps(ROW))
    (tmp_path / "sweep-2-of-2.jsonl").write_text(json.dumps(expected) + "\n" + json.dumps({**ROW, "part": "errors"}))
    found = lines(tmp_path)
    assert found["1       every sample of every operator, eight dtypes, on the CPU"] == ["10", "7", "3", "0", "1", "14"]
    assert found["2       errors of operators: the same type, the same text"] == ["5", "3", "2", "0", "0", "7"]


@pytest.mark.usefixtures("one_is_expected")
def test_only_expected_differences_pass(tmp_path: Path) -> None:
    file = tmp_path / "sweep.jsonl"
    file.write_text(json.dumps({**ROW, "entry": "prod", "part": "float16"}))
    assert figures.main([str(file)]) == 0
    file.write_text(json.dumps(ROW))
    assert figures.main([str(file)]) == 1


def test_plans_and_waits_are_counted_together(tmp_path: Path) -> None:
    (tmp_path / "schedules.jsonl").write_text(json.dumps(PLANS))
    found = lines(tmp_path)["11      plans of random graphs, and of each with a wait left out"]
    assert found == "12 11 1 0 0 0 10000 fewer".split()


def test_predictions_addresses_and_scripts_are_counted(tmp_path: Path) -> None:
    (tmp_path / "crossref-suite.jsonl").write_text(json.dumps(ROW))
    (tmp_path / "memory-check.jsonl").write_text(json.dumps(ROW))
    verdicts = ("equal", "equal", "different", "unstable")
    (tmp_path / "machine-1-of-2.jsonl").write_text("\n".join(json.dumps({"verdict": verdict}) for verdict in verdicts))
    found = lines(tmp_path)
    assert found["3       what is predicted of results: in tests, and in four layouts"] == ["5", "3", "2", "0", "0", "0"]
    assert found["12      addresses of interpreted kernels"] == ["5", "3", "2", "0", "0", "0"]
    assert found["14      random scripts in two worlds, of 2,000 lines"] == "3 2 1 0 0 1 2000 fewer".split()
    assert figures.main([str(tmp_path / "machine-1-of-2.jsonl")]) == 1


SPREAD = 0.25
# Of one training: eager, and three grades of which two are lost.
TRAININGS = [
    {"model": "a", "precision": "amp", **columns}
    for columns in (
        {"column": "eager", "held_out": 1.0, "beyond_bound": 0},
        {"column": "bitwise", "kept": True},
        {"column": "strict", "kept": False},
        {"column": "fast", "kept": False, "spread_of_seeds": SPREAD},
    )
]


@pytest.mark.parametrize(
    ("nudged", "expected"),
    [
        ({"beyond_bound": 3, "held_out": 1 + SPREAD}, 1),
        ({"beyond_bound": 0, "held_out": 1 - 2 * SPREAD}, 1),
        ({"beyond_bound": 3, "held_out": 1 + 2 * SPREAD}, 2),
        ({"beyond_bound": 0, "held_out": 1 - SPREAD}, 0),
        ({"beyond_bound": 3, "held_out": 1 + 2 * SPREAD, "precision": "fp16"}, 0),
    ],
    ids=["the losses of its steps", "its last loss", "both", "neither", "another training's"],
)
def test_a_training_is_lost_expectedly_where_a_nudge_is_beyond_the_same_bound(
    nudged: dict[str, float], expected: int, tmp_path: Path
) -> None:
    rows = [*TRAININGS, {"model": "a", "precision": "amp", "column": "nudged", **nudged}]
    file = tmp_path / "convergence-any.json"
    file.write_text(json.dumps({"rows": rows}))
    name = "7       eight small models, 200 steps, in three grades, on a GPU"
    assert lines(tmp_path)[name] == f"3 1 2 0 {expected} 0 72 fewer".split()
    assert figures.main([str(file)]) == (0 if expected == 2 else 1)


def test_bitwise_is_never_lost_expectedly(tmp_path: Path) -> None:
    wild = {"model": "a", "precision": "amp", "column": "nudged", "beyond_bound": 200, "held_out": 9.0}
    lost = {"model": "a", "precision": "amp", "column": "bitwise", "kept": False}
    file = tmp_path / "convergence-any.json"
    file.write_text(json.dumps({"rows": [TRAININGS[0], lost, wild]}))
    assert figures.main([str(file)]) == 1


def test_of_several_runs_of_a_mutant_the_last_counts(tmp_path: Path) -> None:
    (tmp_path / "mutants.jsonl").write_text("\n".join(map(json.dumps, MUTANTS)))
    assert "mutants of the planner: 2 of 3 found (66.7%), 1 equivalent" in figures.table(figures.read(tmp_path.iterdir()))


def test_minutes_are_added_up(tmp_path: Path) -> None:
    (tmp_path / "sweep-1-of-2.jsonl").write_text(json.dumps({**ROW, "seconds": 90}))
    (tmp_path / "sweep-2-of-2.jsonl").write_text(json.dumps({**ROW, "part": "bool", "seconds": 30}))
    (tmp_path / "mutants.jsonl").write_text("\n".join(json.dumps({**row, "seconds": 6}) for row in MUTANTS))
    said = figures.table(figures.read(tmp_path.iterdir())).splitlines()[-1]
    assert said == "minutes of one core: 2.0 for samples of 1 entries, 0.5 for mutants"


def test_lines_are_counted_by_folder(tmp_path: Path) -> None:
    files = {
        f"kitsune/{name}": {"summary": {"covered_lines": covered, "num_statements": 10}}
        for name, covered in (("lazy/a.py", 9), ("lazy/b.py", 10), ("planning.py", 5))
    }
    (tmp_path / "coverage.json").write_text(json.dumps({"files": files}))
    rows = [row.split() for row in figures.table(figures.read(tmp_path.iterdir())).splitlines() if row.startswith("lines")]
    assert ["lines", "covered:", "lazy", "19", "of", "20", "(95.0%)"] in rows
    assert ["lines", "covered:", "planning.py", "5", "of", "10", "(50.0%)"] in rows


@pytest.mark.parametrize("anchor", figures.ANCHORS, ids=lambda anchor: f"{anchor.name} {anchor.says}")
def test_every_pattern_names_tests_that_are_there(anchor: figures.Anchor) -> None:
    root = Path(figures.__file__).parents[1]
    names = [
        f"{path.relative_to(root)}::{line.split('(')[0].removeprefix('def ')}"
        for path in root.glob("tests/**/test_*.py")
        for line in path.read_text().splitlines()
        if line.startswith("def test_")
    ]
    results = figures.Results(tests=dict.fromkeys(names, "passed"))
    for source in anchor.sources:
        pattern = getattr(source, "args", (None,))[0] if getattr(source, "func", None) is figures._passed else None
        assert pattern is None or source(results)["run"], f"no test is called like {pattern.pattern}"
