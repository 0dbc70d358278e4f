"""Which tests run the lines of a mutant, the cheapest first: what `trace` has written down."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import coverage

from tests.mutants.mutate import AT_IMPORT, Mutant

# What a test takes beside its own seconds: it is collected, often as the only one of its file.
SET_UP = 0.1


@dataclass(frozen=True)
class Map:
    """`tests[path][line]` are those that run a line, `seconds` what each test that passes takes."""

    tests: dict[str, dict[int, set[str]]]
    seconds: dict[str, float]

    def covering(self, mutant: Mutant) -> set[str]:
        """Of what is run at import alone, such as a table: every test that runs anything of its file."""
        lines = self.tests.get(mutant.path, {})
        here = set().union(*(lines.get(n, ()) for n in range(mutant.start[0], mutant.end[0] + 1)))
        # Processes that tests start import the file as well: these are found at its first line.
        importing = lines[min(lines)] if lines else set()
        if AT_IMPORT in here and not here - importing:
            here = set().union(*lines.values())
        return {test for test in here if test in self.seconds}

    def in_turn(self, tests: Iterable[str], budget: float) -> list[str]:
        """As many as the budget of seconds allows: of each file as much, and of each function a few before the next of it."""
        by_file: dict[str, float] = defaultdict(float)
        by_function: dict[str, int] = defaultdict(int)
        ranked = []
        for test in sorted(tests, key=lambda test: (self.seconds[test], test)):
            function = test.partition("[")[0]
            by_function[function] += 1
            ranked.append(((self.seconds[test] + SET_UP) * by_function[function], test))
        in_files = []
        for _, test in sorted(ranked):
            file = test.partition("::")[0]
            by_file[file] += self.seconds[test] + SET_UP
            in_files.append((by_file[file], test))
        taken, total = [], 0.0
        for _, test in sorted(in_files):
            if total + self.seconds[test] + SET_UP <= budget:
                taken.append(test)
                total += self.seconds[test] + SET_UP
        return taken


def load(folders: Sequence[Path]) -> Map:
    """Several folders of `trace`, of which later ones replace what earlier ones say of a test."""
    tests: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    seconds: dict[str, float] = {}
    for folder in folders:
        for line in (folder / "tests.jsonl").read_text().splitlines():
            row = json.loads(line)
            seconds.pop(row["test"], None)
            if row["passed"]:
                seconds[row["test"]] = row["seconds"]
        for file in sorted(folder.glob("lines.*")):
            data = coverage.CoverageData(str(file))
            data.read()
            for name in data.measured_files():
                path = "kitsune/" + name.rpartition("/kitsune/")[2]
                for number, contexts in data.contexts_by_lineno(name).items():
                    # A context that was switched to stands behind that of the process.
                    tests[path][number] |= {context.rpartition("|")[2] for context in contexts}
    return Map(tests, seconds)
