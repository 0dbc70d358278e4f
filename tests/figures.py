"""What the tests have shown, anchor by anchor: how many checks were run, and how many were equal, different, or crashed.

    make test ARGS=--junitxml=results/tests-cpu.xml
    python -m pytest -m gpu --junitxml=results/tests-gpu.xml tests     on a GPU
    make test-full SHARD=1/4; make chaos; make schedules; make mutants; make coverage; make crossref; make memory-check
    python -m tests.property.programs_cuda --shard 1/8 --out programs-1-of-8.jsonl    on a GPU
    python -m tests.property.side_streams --runs 200 --out side-streams.jsonl         on a GPU
    make figures                       the table of all that lies in results/ and in this folder

Anchors are the reference systems whose ways of testing are taken over; each row says what is counted, and from which files. Tests
that count what they compare, or that hypothesis gives examples to, count as many. A row for which nothing has run says so: what
was not run has not been shown; and so does one of which fewer were run than are asked for.
"""

from __future__ import annotations

import argparse
import base64
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tests.parity.expected import expected_reason

COUNTS = ("run", "equal", "different", "crashed")
# Of the different and the crashed, those that tests/parity/expected.py gives reasons for; and what was left out or skipped.
COLUMNS = (*COUNTS, "expected", "not run")
# Files of lines of JSON, by how their names begin.
LINES = ("sweep", "schedules", "mutants", "crossref", "memory-check", "machine", "mixed", "programs", "side-streams")
Row = dict[str, Any]
Counts = Counter[str]


@dataclass
class Results:
    """Everything that was found: the outcome of each test by its name, and the lines of what the sweeps have written."""

    tests: dict[str, str] = field(default_factory=dict)
    # Of tests that count for themselves: as many as COUNTS.
    counted: dict[str, list[int]] = field(default_factory=dict)
    sweep: list[Row] = field(default_factory=list)
    schedules: list[Row] = field(default_factory=list)
    mutants: list[Row] = field(default_factory=list)
    crossref: list[Row] = field(default_factory=list)
    memory_check: list[Row] = field(default_factory=list)
    machine: list[Row] = field(default_factory=list)
    mixed: list[Row] = field(default_factory=list)
    programs: list[Row] = field(default_factory=list)
    side_streams: list[Row] = field(default_factory=list)
    convergence: list[Row] = field(default_factory=list)
    coverage: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Anchor:
    """A row: what its sources count together, and how many are asked for at least."""

    name: str
    says: str
    sources: tuple[Callable[[Results], Counts], ...]
    least: int = 0


def passed(*patterns: str) -> Callable[[Results], Counts]:
    """Tests whose names begin like one of these: equal where they pass, crashed where they raise before or after."""
    return partial(_passed, re.compile("|".join(patterns)))


def _passed(pattern: re.Pattern[str], results: Results) -> Counts:
    counts: Counts = Counter()
    for name, outcome in results.tests.items():
        if pattern.match(name):
            counts.update(_outcome(outcome, results.counted.get(name)))
    return counts


def _outcome(outcome: str, counted: list[int] | None) -> Counts:
    if outcome == "skipped":
        return Counter({"not run": 1})
    counts = Counter(dict(zip(COUNTS, counted, strict=True))) if counted else Counter({"run": 1})
    failed = {"failure": "different", "error": "crashed"}.get(outcome)
    if failed and not counts["different"] + counts["crashed"]:
        counts[failed] += 1
    counts["equal"] = counts["run"] - counts["different"] - counts["crashed"]
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


def rows(name: str) -> Callable[[Results], Counts]:
    """The counts that files of a name hold."""
    return partial(_rows, name)


def _rows(name: str, results: Results) -> Counts:
    return sum((Counter({key: row.get(key, 0) for key in COUNTS}) for row in getattr(results, name)), Counter[str]())


def verdicts(name: str) -> Callable[[Results], Counts]:
    """Programs with a verdict each; where eager differs from itself, nothing is shown."""
    return partial(_verdicts, name)


def _verdicts(name: str, results: Results) -> Counts:
    found = Counter(row["verdict"] for row in getattr(results, name))
    counts = Counter({key: found[key] for key in ("equal", "different", "crashed")})
    return counts + Counter({"run": counts.total(), "not run": found["unstable"]})


def converged(results: Results) -> Counts:
    """Trainings that stay as near eager's losses as their grade asks, of the file that `benchmarks/bench_convergence.py` writes.

    No sum of anybody's stays near where a training multiplies the least rounding. Eager's own training from weights that are one
    unit in the last place away (the column "nudged") shows where: a row that is lost is an expected one where that one leaves the
    row's own bound as well. For "strict" that is the bound of each step's loss; for "fast", how far apart seeds of eager end on
    unseen data. Nothing is lost expectedly for "bitwise".
    """
    judged = [row for row in results.convergence if "kept" in row]
    lost = [row for row in judged if not row["kept"]]
    eager, nudged = (
        {_training(row): row for row in results.convergence if row["column"] == column} for column in ("eager", "nudged")
    )

    def wild(row: Row) -> bool:
        nudge = nudged.get(_training(row))
        if nudge is None or row["column"] not in ("strict", "fast"):
            return False
        if row["column"] == "strict":
            return bool(nudge["beyond_bound"])
        return bool(abs(nudge["held_out"] - eager[_training(row)]["held_out"]) > row["spread_of_seeds"])

    expected = sum(map(wild, lost))
    return Counter({"run": len(judged), "equal": len(judged) - len(lost), "different": len(lost), "expected": expected})


def _training(row: Row) -> tuple[str, str]:
    return row["model"], row["precision"]


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
CHAOS, STATE = "tests/chaos/test_", r"tests/test_doors_state.*::test_"
ANCHORS = (
    Anchor("1", "every sample of every operator, eight dtypes, on the CPU", (swept(f"{DTYPES}|pending|in place", OPERATORS),)),
    Anchor("1", "the same entries, fused, on a GPU", (passed(r"tests/parity/test_fused_op"),)),
    Anchor("2", "errors of operators: the same type, the same text", (swept("errors"),)),
    Anchor(
        "3",
        "what is predicted of results: in tests, and in four layouts",
        (rows("crossref"), passed(r"tests/parity/test_crossref")),
    ),
    Anchor("4", "torch's checks of operators with schemas of their own", (passed(r"tests/test_registered_operators"),)),
    Anchor("5", "single operators at torch's own tolerances, from a table", (passed(r"tests/parity/test_op_db"),)),
    Anchor("6", "reductions: as near to float64 as eager", (passed(r".*reductions.*::test_results_are_as_near"),)),
    Anchor(
        "6", "models, ten steps: as near to float64 as eager", (passed(r"tests/steady/test_two_hundred.*::test_with_fusion"),)
    ),
    Anchor("7", "eight small models, 200 steps, in three grades, on a GPU", (converged,), 72),
    Anchor("7", "first steps of these, and 50 of others", (passed(r"tests/parity/test_(training|convergence)"),)),
    Anchor("8", "optimizers: all of torch's", (swept("", "optimizer/"),), 15),
    Anchor("8", "optimizers: options, states, wrappers", (passed(r"tests/api/test_(state|optimizer)", r"tests/test_optimizer"),)),
    Anchor("9", "CUDA graphs: captures, failures, replays", (passed(r"tests/runtime/test_(capture|steady|branch)"),)),
    Anchor(
        "9",
        "1,000 captures; steps from one state, 10,000 times",
        (passed(r".*_thousand_captures", r"tests/steady/test_restored"),),
    ),
    Anchor(
        "10",
        "memory: nothing is left behind, after 100,000 steps either",
        (passed(r".*::test_.*(leak|nothing_behind|endless_memory)"),),
    ),
    Anchor(
        "11",
        "plans of random graphs, and of each with a wait left out",
        (planned, passed(r"tests/property/test_schedules")),
        10_000,
    ),
    Anchor("12", "addresses of interpreted kernels", (rows("memory_check"), passed(r"tests/codegen/test_(memory_check|masks)"))),
    Anchor("12", "compute-sanitizer over each kernel, on a GPU", (passed(r"tests/runtime/test_sanitizer_cuda"),), 4),
    Anchor("12", "more than 2^31 elements, on a GPU", (passed(r"tests/runtime/test_wide_cuda"),)),
    Anchor("13", "recorded regions and steps, planned again", (passed(r"tests/plan/test_corpus_plans", r"tests/corpus"),), 500),
    Anchor("14", "random programs, by replay and by plan", (passed(r"tests/property/(?!test_schedules)"),), 400),
    Anchor("14", "random programs on a GPU: the bits of replay by kernels", (rows("programs"),), 5_000),
    Anchor("14", "random training loops on several streams of a GPU", (verdicts("side_streams"),), 200),
    Anchor("14", "random trainings, put together from parts", (verdicts("mixed"), passed("tests/steady/test_mixed")), 2_000),
    Anchor("14", "random scripts in two worlds, of 2,000 lines", (verdicts("machine"),), 2_000),
    Anchor(
        "15", "writes, aliases, views, data of tensors", (passed(r"tests/test_(doors|regressions)", r"tests/plan/test_record"),)
    ),
    Anchor("16", "text of kernels, as it was written down", (passed(r"tests/golden"),), 40),
    Anchor(
        "numbers", "fused kernels on all values of 16 bits, NaN, zeros, on a GPU", (passed(r"tests/parity/test_special_values"),)
    ),
    Anchor("numbers", "types of all pairs of operands", (passed(r"tests/parity/test_promotion"),)),
    Anchor("numbers", "masks of dropout, generators, deterministic runs", (passed(r"tests/parity/test_random_and"),)),
    Anchor("chaos", "doors of Python on pending tensors", (passed(r"tests/test_doors"),)),
    Anchor(
        "chaos",
        "operators of others, users' functions and kernels",
        (swept("", "custom/|function/"), passed(r"tests/test_interop", f"{CHAOS}users")),
    ),
    Anchor(
        "chaos",
        "the device is waited for, timed, and used on other streams",
        (passed(STATE + "(the_device_is|an_event|work_on)"),),
    ),
    Anchor("chaos", "compiled modules", (passed(f"{CHAOS}compiled"),)),
    Anchor("chaos", "foreign modes and subclasses", (passed(f"{CHAOS}foreign"),)),
    Anchor("chaos", "threads", (passed(f"{CHAOS}threads"),)),
    Anchor("chaos", "checkpoints; contexts around a part of a step", (passed(f"{CHAOS}checkpoints"),)),
    Anchor("chaos", "exceptions and interrupts", (passed(f"{CHAOS}interrupts", r"tests/test_bad_input"),)),
    Anchor("chaos", "lack of memory, operators that fail", (passed(f"{CHAOS}failures", r"tests/runtime/test_out_of_memory"),)),
    Anchor(
        "chaos",
        "kernels that do not compile or start",
        (passed(r"tests/(codegen/test_compile_p|runtime/test_(plan_ex|cold_st))"),),
    ),
    Anchor("chaos", "damaged, shared, read-only caches", (passed(r"tests/codegen/test_cache", r"tests/plan/test_plan_files"),)),
    Anchor("chaos", "forked and spawned workers", (passed(f"{CHAOS}workers"),)),
    Anchor("chaos", "pickles, copies and files of what is pending", (passed(f"{CHAOS}pickles"),)),
    Anchor(
        "chaos",
        "hooks, kept graphs, late histories, writes to what is saved",
        (passed(rf"{CHAOS}(late|writes)", r"tests/steady/test_unseen"),),
    ),
    Anchor("chaos", "first and second gradients of every operator", (swept("gradcheck|gradgradcheck"),)),
    Anchor("chaos", "every operator under vmap", (swept("vmap"),)),
    Anchor("chaos", "trainings of several processes", (passed(f"{CHAOS}distributed"),)),
    Anchor("chaos", "100,000 operators, 10,000 layers, 1,000 batch sizes", (passed(f"{CHAOS}long"),)),
    Anchor("chaos", "steps that are left to eager", (passed(r"tests/test_gate", r"tests/test_left_to_eager"),)),
)


def read(paths: Iterable[Path]) -> Results:
    """Files of results, told apart by their names; what a folder holds."""
    results = Results()
    for path in paths:
        if path.suffix == ".xml":
            _add_tests(results, path)
        elif path.name.startswith("coverage"):
            results.coverage = json.loads(path.read_text())
        elif path.name.startswith("convergence"):
            results.convergence.extend(json.loads(path.read_text())["rows"])
        else:
            found = [json.loads(line) for line in path.read_text().splitlines()]
            for name in LINES:
                if path.name.startswith(name):
                    getattr(results, name.replace("-", "_")).extend(found)
    # Of several runs of an entry the last counts.
    results.sweep = list({(row["entry"], row["part"]): row for row in results.sweep}.values())
    return results


def _add_tests(results: Results, path: Path) -> None:
    """A test that is skipped on one machine may have run on another, and one may count more in another run. What fails in one of
    them fails."""
    root = ElementTree.parse(path).getroot()
    examples = {name: found for suite in root.iter("testsuite") for name, found in _examples(suite)}
    for case in root.iter("testcase"):
        file = case.get("file") or case.get("classname", "").replace(".", "/") + ".py"
        name = f"{file}::{case.get('name')}"
        counted = examples.get(name)
        for said in case.iterfind("properties/property[@name='counts']"):
            counted = json.loads(said.get("value", ""))
        outcome = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
        known = results.tests.get(name, "skipped")
        more = outcome == "passed" == known and (counted or [0]) > results.counted.get(name, [0])
        if outcome in ("failure", "error") or known == "skipped" or more:
            results.tests[name] = outcome
            results.counted.pop(name, None)
            if counted:
                results.counted[name] = counted


def _examples(suite: ElementTree.Element) -> Iterator[tuple[str, list[int]]]:
    """How many programs hypothesis says to have given to which test."""
    for said in suite.iterfind("properties/property"):
        kind, _, name = said.get("name", "").partition("statistics-")
        if kind == "hypothesis-":
            text = base64.b64decode(said.get("value", "")).decode()
            equal, different = (sum(map(int, re.findall(rf"(\d+) {how}", text))) for how in ("passing", "failing"))
            yield name, [equal + different, equal, different, 0]


def table(results: Results) -> str:
    """A line for each anchor, and the other figures below."""
    lines = [f"{'':8s}{'':66s}" + "".join(f"{name:>10s}" for name in (*COLUMNS, "asked"))]
    for anchor in ANCHORS:
        counts = counted(anchor, results)
        numbers = "".join(f"{counts[name]:10d}" for name in COLUMNS) if counts["run"] else f"{'not run':>60s}"
        asked = f"{anchor.least:10d}" if anchor.least else ""
        fewer = "  fewer" if 0 < counts["run"] < anchor.least else ""
        lines.append(f"{anchor.name:8s}{anchor.says:66s}{numbers}{asked}{fewer}")
    return "\n".join([*lines, _mutants(results), *_covered(results), _minutes(results)])


def counted(anchor: Anchor, results: Results) -> Counts:
    return sum((source(results) for source in anchor.sources), Counter[str]())


def _mutants(results: Results) -> str:
    verdicts = Counter(row["verdict"] for row in {row["mutant"]: row for row in results.mutants}.values())
    if not verdicts:
        return "mutants of the planner: not run"
    found, of = verdicts["killed"] + verdicts["timed out"], verdicts.total() - verdicts["equivalent"]
    return f"mutants of the planner: {found} of {of} found ({found / max(of, 1):.1%}), {verdicts['equivalent']} equivalent"


def _minutes(results: Results) -> str:
    """What the longest of all of them took: so many shards are needed where each is to end in time."""
    swept, tried = (sum(row.get("seconds", 0) for row in rows) / 60 for rows in (results.sweep, results.mutants))
    entries = len({row["entry"] for row in results.sweep})
    return f"minutes of one core: {swept:.1f} for samples of {entries} entries, {tried:.1f} for mutants"


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
    totals = sum((counted(anchor, results) for anchor in ANCHORS), Counter[str]())
    return 1 if totals["different"] + totals["crashed"] > totals["expected"] else 0


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*", help="results; else all of results/ and of this folder")
    options = parser.parse_args(given)
    patterns = ("results/*.xml", "results/*.json*", *(f"{name}*.json*" for name in (*LINES, "coverage")))
    patterns = (*patterns, "benchmarks/results/convergence-*.json")
    results = read(options.files or sorted(path for pattern in patterns for path in Path().glob(pattern)))
    print(table(results))
    return status(results)


if __name__ == "__main__":
    sys.exit(main())
