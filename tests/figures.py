"""What the tests have shown, anchor by anchor: how many checks were run, and how many were equal, different, or crashed.

    make test ARGS=--junitxml=results/tests-cpu.xml
    python -m pytest -m gpu --junitxml=results/tests-gpu.xml tests     on a GPU
    make test-full SHARD=1/4; make schedules; make mutants; make coverage; make chaos; make crossref; make memory-check
    make figures                       the table of all that lies in results/ and in this folder

Anchors are the reference systems whose ways of testing are taken over; each row says what is counted, and from which files. A
row for which nothing has run says so: what was not run has not been shown.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tests.parity.expected import expected_reason

COUNTS = ("run", "equal", "different", "crashed")
# Of the different and the crashed, those that tests/parity/expected.py gives reasons for; and what was left out or skipped.
COLUMNS = (*COUNTS, "expected", "not run")
Row = dict[str, Any]
Counts = Counter[str]


@dataclass
class Results:
    """Everything that was found: the outcome of each test by its name, and the lines of what the sweeps have written."""

    tests: dict[str, str] = field(default_factory=dict)
    sweep: list[Row] = field(default_factory=list)
    schedules: list[Row] = field(default_factory=list)
    mutants: list[Row] = field(default_factory=list)
    crossref: list[Row] = field(default_factory=list)
    memory_check: list[Row] = field(default_factory=list)
    machine: list[Row] = field(default_factory=list)
    coverage: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Anchor:
    """A row: what its sources count together."""

    name: str
    says: str
    sources: tuple[Callable[[Results], Counts], ...]


def passed(*patterns: str) -> Callable[[Results], Counts]:
    """Tests whose names begin like one of these: equal where they pass, crashed where they raise before or after."""
    return partial(_passed, re.compile("|".join(patterns)))


def _passed(pattern: re.Pattern[str], results: Results) -> Counts:
    outcomes = Counter(outcome for name, outcome in results.tests.items() if pattern.match(name))
    counts = Counter({"equal": outcomes["passed"], "different": outcomes["failure"], "crashed": outcomes["error"]})
    counts["run"] = counts.total()
    counts["not run"] = outcomes["skipped"]
    return counts


def swept(parts: str = "", entries: str = "") -> Callable[[Results], Counts]:
    """Samples of the sweep in parts and entries that match."""
    return partial(_swept, re.compile(parts), re.compile(entries))


def _swept(parts: re.Pattern[str], entries: re.Pattern[str], results: Results) -> Counts:
    counts: Counts = Counter()
    for row in results.sweep:
        if parts.match(row["part"]) and entries.match(row["entry"]):
            wrong = row["different"] + row["crashed"] if expected_reason(row["entry"], row["part"]) else 0
            counts.update({name: row[name] for name in COUNTS} | {"not run": row["left_out"], "expected": wrong})
    return counts


def crossed(results: Results) -> Counts:
    """Calls predicted in tests, and samples in other layouts."""
    return sum((Counter({name: row[name] for name in COUNTS}) for row in results.crossref), Counter[str]())


def watched(results: Results) -> Counts:
    """Launches of kernels in the interpreter, of which every address was looked at."""
    return sum((Counter({name: row[name] for name in COUNTS}) for row in results.memory_check), Counter[str]())


def scripted(results: Results) -> Counts:
    """Scripts in two worlds; where eager differs from itself, nothing is shown."""
    verdicts = Counter(row["verdict"] for row in results.machine)
    counts = Counter({name: verdicts[name] for name in ("equal", "different", "crashed")})
    return counts + Counter({"run": counts.total(), "not run": verdicts["unstable"]})


def planned(results: Results) -> Counts:
    """Plans that are sound, and waits whose absence is judged rightly: seen where they are needed, and only there."""
    counts: Counts = Counter()
    for row in results.schedules:
        n_waits = sum(row.get(name, 0) for name in ("needed", "implied", "spare"))
        different = row.get("unsound", 0) + row.get("wrong", 0)
        counts.update(run=row["plans"] + n_waits, different=different, equal=row["plans"] + n_waits - different)
    return counts


DTYPES = "float32|bfloat16|float16|float64|complex64|int64|uint8|bool"
OPERATORS = r"(?!module/|optimizer/)"
ANCHORS = (
    Anchor("1", "every sample of every operator, eight dtypes, on the CPU", (swept(f"{DTYPES}|pending|in place", OPERATORS),)),
    Anchor("1", "the same entries, fused", (passed(r"tests/parity/test_fused"),)),
    Anchor("2", "errors of operators: the same type, the same text", (swept("errors"),)),
    Anchor("3", "what is predicted of results: in tests, and in four layouts", (crossed, passed(r"tests/parity/test_crossref"))),
    Anchor("4", "torch's checks of operators with schemas of their own", (passed(r"tests/test_registered_operators"),)),
    Anchor("5", "single operators at torch's own tolerances, from a table", (passed(r"tests/parity/test_op_db"),)),
    Anchor("6", "reductions: as near to float64 as eager", (passed(r"tests/codegen/test_reductions.*::test_results_are"),)),
    Anchor("7", "convergence of eight small models, in three grades", (passed(r"tests/parity/test_(training|convergence)"),)),
    Anchor("8", "optimizers: all of torch's", (swept("", "optimizer/"),)),
    Anchor("8", "optimizers: options, states, wrappers", (passed(r"tests/api/test_(state|optimizer)", r"tests/test_optimizer"),)),
    Anchor("9", "CUDA graphs: captures, failures, replays", (passed(r"tests/runtime/test_(capture|steady|branch)"),)),
    Anchor("10", "memory: nothing is left behind", (passed(r".*::test_.*(leak|nothing_behind|endless_memory)"),)),
    Anchor("11", "plans of random graphs, and of each with a wait left out", (planned, passed(r"tests/property/test_schedules"))),
    Anchor("12", "addresses of interpreted kernels", (watched, passed(r"tests/codegen/test_(memory_check|masks)"))),
    Anchor("12", "compute-sanitizer over each kernel, on a GPU", (passed(r"tests/runtime/test_sanitizer_cuda"),)),
    Anchor("13", "recorded steps, planned again", (passed(r"tests/plan/test_corpus_plans", r"tests/corpus"),)),
    Anchor("14", "random programs", (passed(r"tests/property/(?!test_schedules)"),)),
    Anchor("14", "random scripts in two worlds, of 2,000 lines", (scripted,)),
    Anchor(
        "15", "writes, aliases, views, data of tensors", (passed(r"tests/test_(doors|regressions)", r"tests/plan/test_record"),)
    ),
    Anchor("16", "text of kernels, as it was written down", (passed(r"tests/golden"),)),
)


def chaos(results: Results) -> list[Anchor]:
    """A row for each file of the tests of what users do to a program."""
    files = sorted({name.partition("::")[0] for name in results.tests if name.startswith("tests/chaos/")})
    says = {file: Path(file).stem.removeprefix("test_").replace("_", " ") for file in files}
    return [Anchor("chaos", says[file], (passed(re.escape(file)),)) for file in files]


def read(paths: Iterable[Path]) -> Results:
    """Files of results, told apart by their names; what a folder holds."""
    results = Results()
    for path in paths:
        if path.suffix == ".xml":
            _add_tests(results.tests, path)
        elif path.name.startswith("coverage"):
            results.coverage = json.loads(path.read_text())
        else:
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            for name in ("sweep", "schedules", "mutants", "crossref", "memory_check", "machine"):
                if path.name.replace("-", "_").startswith(name):
                    getattr(results, name).extend(rows)
    return results


def _add_tests(tests: dict[str, str], path: Path) -> None:
    """A test that is skipped on one machine may have run on another."""
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        file = case.get("file") or case.get("classname", "").replace(".", "/") + ".py"
        name = f"{file}::{case.get('name')}"
        outcome = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
        if outcome != "skipped" or name not in tests:
            tests[name] = outcome


def table(results: Results) -> str:
    """A line for each anchor, and the other figures below."""
    lines = [f"{'':6s}{'':66s}" + "".join(f"{name:>10s}" for name in COLUMNS)]
    for anchor in (*ANCHORS, *chaos(results)):
        counts = sum((source(results) for source in anchor.sources), Counter[str]())
        numbers = "".join(f"{counts[name]:10d}" for name in COLUMNS)
        lines.append(f"{anchor.name:6s}{anchor.says:66s}{numbers if counts['run'] else '   not run'}")
    return "\n".join([*lines, _mutants(results), *_covered(results)])


def _mutants(results: Results) -> str:
    verdicts = Counter(row["verdict"] for row in {row["mutant"]: row for row in results.mutants}.values())
    if not verdicts:
        return "mutants of the planner: not run"
    found, of = verdicts["killed"] + verdicts["timed out"], verdicts.total() - verdicts["equivalent"]
    return f"mutants of the planner: {found} of {of} found ({found / max(of, 1):.1%}), {verdicts['equivalent']} equivalent"


FOLDERS = ("dispatch", "lazy", "planning.py", "scheduler", "fusion", "memory", "codegen")


def _covered(results: Results) -> list[str]:
    """Lines of record, plan and codegen that the tests run, from `coverage json`."""
    if not results.coverage:
        return ["lines covered: not run"]
    found = []
    for folder in FOLDERS:
        inside = f"kitsune/{folder}" if folder.endswith(".py") else f"kitsune/{folder}/"
        files = [file["summary"] for path, file in results.coverage["files"].items() if inside in path]
        covered, lines = (sum(file[name] for file in files) for name in ("covered_lines", "num_statements"))
        found.append(f"lines covered: {folder:12s} {covered:6d} of {lines:6d} ({covered / max(lines, 1):.1%})")
    return found


def status(results: Results) -> int:
    """1 if anything that has run is different or crashed."""
    anchors = (*ANCHORS, *chaos(results))
    totals = sum((source(results) for anchor in anchors for source in anchor.sources), Counter[str]())
    return 1 if totals["different"] + totals["crashed"] > totals["expected"] else 0


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*", help="results; else all of results/ and of this folder")
    options = parser.parse_args(given)
    found = "sweep schedules mutants crossref memory-check machine coverage".split()
    patterns = ("results/*.xml", "results/*.json*", *(f"{name}*.json*" for name in found))
    results = read(options.files or sorted(path for pattern in patterns for path in Path().glob(pattern)))
    print(table(results))
    return status(results)


if __name__ == "__main__":
    sys.exit(main())
