"""Counts what was run, equal, different and crashed, and prints it behind the tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kitsune
from tests.chaos.counting import COUNTS, Counts
from tests.leaks import PASSED


@pytest.fixture
def counts(record_property: Any, request: pytest.FixtureRequest) -> Iterator[Counts]:
    """What a test compares; it fails at its end if anything was different or crashed."""
    kitsune.reset()
    found = Counts()
    yield found
    record_property("counts", [found.numbers[name] for name in COUNTS])
    # One that was skipped inside has compared nothing, and neither has one that failed before.
    assert found.numbers["run"] > 0 or not request.node.stash.get(PASSED, False)
    assert not found.told, "\n".join(found.told[:5])


def pytest_terminal_summary(terminalreporter: Any) -> None:
    table: dict[str, Counter[str]] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in getattr(report, "user_properties", ()):
                if name == "counts" and report.when == "teardown" and "/chaos/" in report.nodeid:
                    row = Path(report.nodeid.partition("::")[0]).stem
                    table.setdefault(row, Counter()).update(dict(zip(COUNTS, value, strict=True)))
    if table:
        terminalreporter.write_line(f"{'':34}" + "".join(f"{name:>11}" for name in COUNTS))
    for row, numbers in sorted(table.items()):
        terminalreporter.write_line(f"{row:34}" + "".join(f"{numbers[name]:11}" for name in COUNTS))
