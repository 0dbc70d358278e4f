"""A plugin of pytest that writes down which lines of Kitsune each test reaches, how long it takes, and whether it passed.

    MUTANTS_TRACE=folder python -m pytest -p tests.mutants.trace tests/plan

Processes that a test starts are traced as that test. The lines go to `folder/lines.*`, which coverage.py reads, the rest to
`folder/tests.jsonl`.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import coverage
import pytest

from tests.mutants.mutate import AT_IMPORT

FOLDER = Path(os.environ["MUTANTS_TRACE"]).resolve()
HERE = Path(__file__).parent


def start(context: str) -> coverage.Coverage:
    """Trace this process from now on."""
    package = str(HERE.parents[1] / "kitsune")
    cov = coverage.Coverage(
        data_file=str(FOLDER / "lines"), data_suffix=True, source=[package], config_file=False, context=context
    )
    # Of modules that were imported before nothing is said: `run` says that of those that matter.
    cov.set_option(
        "run:disable_warnings", ["module-not-imported", "no-data-collected", "module-not-measured", "already-imported"]
    )
    cov.start()
    return cov


if "MUTANTS_CONTEXT" not in os.environ:
    FOLDER.mkdir(parents=True, exist_ok=True)
    tracer = start(AT_IMPORT)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE / "child"), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    seconds: dict[str, float] = defaultdict(float)
    passed: dict[str, bool] = {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    os.environ["MUTANTS_CONTEXT"] = item.nodeid
    tracer.switch_context(item.nodeid)
    result = yield
    tracer.switch_context(AT_IMPORT)
    return result


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    seconds[report.nodeid] += report.duration
    passed[report.nodeid] = passed.get(report.nodeid, True) and report.passed


def pytest_sessionfinish(session: Any) -> None:
    tracer.stop()
    tracer.save()
    with (FOLDER / "tests.jsonl").open("a") as file:
        for nodeid, took in seconds.items():
            file.write(json.dumps({"test": nodeid, "seconds": round(took, 3), "passed": passed[nodeid]}) + "\n")
