"""Mutation testing of the planner and of what renders kernels: is every small mistake found by a test?

    make mutants                                     320 mutants; writes mutants.jsonl; an hour on one core
    python -m tests.mutants.run --map DIR            with the lines that an earlier run has traced
    python -m tests.mutants.run --map DIR --shard 1/2 --skip mutants.jsonl      half of what was not killed there
    python -m tests.mutants.run --merge mutants.jsonl ...      the table again, and nothing run

A mutant is put into a copy of the tree, never into the tree itself, and the cheapest tests that run its lines are run there,
until one fails: it is killed. Before, the tests are traced once, which takes a quarter of an hour. `equivalent.py` lists mutants
that change nothing that matters, with the reason. Exits with 1 if fewer than 95 % of the others are killed.
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import gc
import importlib
import json
import os
import py_compile
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.mutants.equivalent import EQUIVALENT
from tests.mutants.mutate import ROOT, Mutant, all_mutants, chosen

TRACED = (
    "tests/plan tests/golden tests/codegen tests/corpus/test_regions.py tests/api/test_fusion_api.py "
    "tests/api/test_optimizer_options.py tests/test_tiny.py "
    "tests/checking/test_kernels.py tests/property/test_schedules.py tests/runtime/test_branch_events.py "
    "tests/runtime/test_layouts.py tests/runtime/test_out_forms.py tests/runtime/test_plan_executor.py "
    "tests/runtime/test_pool.py tests/runtime/test_random_layouts.py tests/runtime/test_real_plans.py"
).split()
# Seconds of tests, as traced, that a mutant is given at first, and those that it must survive after that.
BUDGETS = "8,16"
# What the text of a kernel computes is seen by Triton's interpreter alone, in long tests: these are last. They run only what a
# mutant changes (tests/codegen/known.py), which takes a fifth of the time that was traced.
INTERPRETER = tuple(
    f"tests/codegen/test_{name}"
    for name in (
        "interpreted.py::test_kernels_compute_what_aten_does",
        "windows.py::test_pooling_computes_what_aten_does",
        "reductions.py::test_results_are_as_near_to_float64_as_eagers[float32]",
        "reductions.py::test_results_are_as_near_to_float64_as_eagers[float64]",
        "reductions.py::test_results_are_as_near_to_float64_as_eagers[layouts]",
        "reductions.py::test_results_are_as_near_to_float64_as_eagers[special]",
        "reductions.py::test_results_are_as_near_to_float64_as_eagers[batched]",
    )
)
INTERPRETED = 200.0
# Real seconds for each of them: a mutant may loop for ever.
SLACK = 60.0
NEEDED = 0.95
VERDICTS = ("killed", "timed out", "survived", "not covered", "equivalent")
SETTINGS = {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "KITSUNE_VERIFY": "1"}
PRELOADED = (
    "pytest hypothesis.extra._patching _hypothesis_pytestplugin numpy torch torch._meta_registrations torch._decomp "
    "torch._subclasses.fake_tensor torch.utils.checkpoint triton expecttest"
).split()
# No assertion is rewritten: whether one fails is all that counts, and half of a short run went into that.
FLAGS = ("-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--assert", "plain")
Row = dict[str, Any]


class FirstFailure:
    """A plugin of pytest that writes down the test that kills."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.file.exists():
            self.file.write_text(report.nodeid)


class Copy:
    """A copy of the tree with one mutant in it at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("kitsune", "tests", "benchmarks"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        for file in ("pyproject.toml", "README.md", "Makefile"):
            shutil.copy(ROOT / file, folder / file)
        # A mutant may be as long as what it replaces, and as old: let what is compiled be known by its content.
        compileall.compile_dir(folder, quiet=2, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)

    def verdict(self, mutant: Mutant | None, tests: Sequence[str], seconds: float) -> tuple[str, str]:
        """What becomes of a mutant, and which test killed it."""
        if mutant is not None:
            file = self.folder / mutant.path
            source = file.read_text()
            file.write_text(mutant.applied(source))
        try:
            return self._run(tests, seconds)
        finally:
            if mutant is not None:
                file.write_text(source)

    def _run(self, tests: Sequence[str], seconds: float) -> tuple[str, str]:
        said = self.folder / "first-failure"
        said.unlink(missing_ok=True)
        with warnings.catch_warnings():
            # Of threads that a child lacks: those of torch wait for work, and hold nothing.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if not child:
            _be_pytest(self.folder, tests, said)
        # In both processes, whichever comes first: what the tests start is killed with them.
        os.setpgid(child, child)
        limit = time.monotonic() + seconds
        while time.monotonic() < limit:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                by = said.read_text() if said.exists() else f"exit status {os.waitstatus_to_exitcode(status)}"
                return ("killed", by) if status else ("survived", "")
            time.sleep(0.02)
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return "timed out", said.read_text() if said.exists() else ""


def _be_pytest(folder: Path, tests: Sequence[str], said: Path) -> None:
    """In a forked process, which has torch and the rest already but nothing of Kitsune: 3 s are saved for each mutant."""
    status = 70
    try:
        os.setpgid(0, 0)
        resource.setrlimit(resource.RLIMIT_DATA, (12 << 30, 12 << 30))
        os.chdir(folder)
        with open(folder / "output", "w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        for name in [name for name in sys.modules if name.partition(".")[0] in ("tests", "kitsune")]:
            del sys.modules[name]
        sys.path[:] = [str(folder), *(path for path in sys.path if path not in ("", str(ROOT)))]
        os.environ["PYTHONPATH"] = str(folder)
        import pytest

        status = int(pytest.main([*FLAGS, *tests], [FirstFailure(said)]))
    finally:
        os._exit(status)


def preload() -> None:
    """Import what every run of the tests imports, of which nothing is mutated."""
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    # No run is to look at all of torch's modules when it collects garbage, or to copy their pages.
    gc.freeze()
    assert "kitsune" not in sys.modules, "what is imported here is the same for all mutants"


def trace(folder: Path, tests: Sequence[str]) -> None:
    """Run tests once to see which lines they run, each part of them in a process of its own."""
    environment = {**os.environ, **SETTINGS, "MUTANTS_TRACE": str(folder)}
    for part in tests:
        command = [sys.executable, "-m", "pytest", "-p", "tests.mutants.trace", "-q", "-p", "no:cacheprovider", part]
        subprocess.run(command, cwd=ROOT, env=environment, check=False)


def tried(copy: Copy, lines: Any, mutant: Mutant, budgets: Sequence[float], interpreted: bool) -> Row:
    """Run the tests that cover a mutant, the cheap ones first."""
    row: Row = {"mutant": mutant.key, "kind": mutant.kind, "path": mutant.path, "line": mutant.start[0], "by": "", "tests": 0}
    began = time.monotonic()
    covering = lines.covering(mutant)
    row["verdict"] = "survived" if covering else "not covered"
    for tests in rounds(lines, covering, budgets, interpreted and "/codegen/" in mutant.path):
        if tests and row["verdict"] == "survived":
            row["tests"] += len(tests)
            seconds = sum(lines.seconds[test] for test in tests)
            row["verdict"], row["by"] = copy.verdict(mutant, tests, SLACK + 3 * seconds)
    if row["verdict"] in ("survived", "not covered") and mutant.key in EQUIVALENT:
        row["verdict"] = "equivalent"
    return {**row, "seconds": round(time.monotonic() - began, 1)}


def rounds(lines: Any, covering: set[str], budgets: Sequence[float], interpreted: bool) -> Iterator[list[str]]:
    """The tests for a mutant, those of each budget apart."""
    for budget in budgets:
        tests = lines.in_turn(covering, budget)
        covering = covering - set(tests)
        yield tests
    if interpreted:
        yield lines.in_turn({test for test in covering if test.startswith(INTERPRETER)}, INTERPRETED)


def record(copy: Copy, tests: Sequence[str], file: Path) -> None:
    """Run what the interpreter runs once as it is, so that a mutant has to run only what it changes."""
    os.environ.update({"MUTANTS_KNOWN_PROGRAMS": str(file), "MUTANTS_RECORD": "1"})
    verdict, by = copy.verdict(None, tests, 1000)
    del os.environ["MUTANTS_RECORD"]
    if verdict != "survived":
        sys.exit(
            f"{by or 'a test'} fails without any mutant ({verdict}): mend that first. {copy.folder / 'output'} has its output."
        )


def told(rows: Sequence[Row]) -> int:
    """Print the survivors and a table by kind; the exit status."""
    for row in rows:
        if row["verdict"] in ("survived", "not covered"):
            print(f"{row['verdict']}: {row['mutant']} (line {row['line']}, {row['tests']} tests)")
    print(f"{'':34s}" + "".join(f"{verdict:>13s}" for verdict in VERDICTS))
    for kind in [*sorted({row["kind"] for row in rows}), "all"]:
        counts = Counter(row["verdict"] for row in rows if kind in (row["kind"], "all"))
        print(f"{kind:34s}" + "".join(f"{counts[verdict]:13d}" for verdict in VERDICTS))
    counts = Counter(row["verdict"] for row in rows)
    for key in sorted(set(EQUIVALENT) - {mutant.key for mutant in all_mutants()}):
        print(f"no such mutant any more, take it out of equivalent.py: {key}")
    found, of = counts["killed"] + counts["timed out"], len(rows) - counts["equivalent"]
    print(f"{found} of {of} mutants are found: {found / max(of, 1):.1%}; {sum(row['seconds'] for row in rows) / 60:.1f} minutes")
    return 0 if found >= NEEDED * of else 1


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=320, help="of mutants")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--map", type=Path, nargs="*", default=[], help="folders that an earlier run has traced")
    parser.add_argument("--only", default="", help="mutants with this in their keys, of all that there are")
    parser.add_argument("--budgets", default=BUDGETS, help="seconds of tests for each mutant, and for what survives them")
    parser.add_argument("--no-interpreter", action="store_true", help="leave out the long tests, of what kernels compute")
    parser.add_argument("--skip", type=Path, help="results of an earlier run: what was killed there is killed")
    parser.add_argument("--shard", default="1/1", help="2/3: the second of every three that are left")
    parser.add_argument("--out", type=Path, default=Path("mutants.jsonl"), help="a line of JSON for each mutant")
    parser.add_argument("--merge", type=Path, nargs="+", help="say what these files hold, and run nothing")
    return parser.parse_args(given)


def read(files: Sequence[Path]) -> list[Row]:
    """Of several rows of one mutant the last."""
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return list({row["mutant"]: row for row in rows}.values())


def main(given: Sequence[str] | None = None) -> int:
    options = arguments(given)
    if options.merge:
        return told(read(options.merge))
    from tests.mutants import tests_of

    named = [mutant for mutant in all_mutants() if options.only in mutant.key]
    mutants = named if options.only else chosen(named, options.number, options.seed)
    os.environ.update(SETTINGS)
    found = {row["mutant"]: row for row in read([options.skip])} if options.skip else {}
    known = {name: row for name, row in found.items() if row["verdict"] in ("killed", "timed out")}
    shard, of = map(int, options.shard.split("/"))
    left = [mutant for mutant in mutants if mutant.key not in known][shard - 1 :: of]
    with tempfile.TemporaryDirectory() as scratch:
        folders = options.map or [Path(scratch) / "map"]
        if not options.map:
            trace(folders[0], TRACED)
        lines = tests_of.load(folders)
        preload()
        copy = Copy(Path(scratch) / "tree")
        if not options.no_interpreter:
            record(copy, [test for test in lines.seconds if test.startswith(INTERPRETER)], Path(scratch) / "known")
        budgets = [float(budget) for budget in options.budgets.split(",") if budget]
        rows = [known[mutant.key] for mutant in mutants if mutant.key in known]
        with options.out.open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
            for mutant in left:
                rows.append(tried(copy, lines, mutant, budgets, not options.no_interpreter))
                file.write(json.dumps(rows[-1]) + "\n")
                file.flush()
    return told(rows)


if __name__ == "__main__":
    sys.exit(main())
