"""What every test shares: graphs are verified, GPU tests skip without a GPU, hypothesis is repeatable."""

from __future__ import annotations

import os

# Read by kitsune.config at import, so they are set before anything imports kitsune.
os.environ.setdefault("KITSUNE_VERIFY", "1")
# On a CPU the gate would leave nearly every step to eager, and these tests are of what Kitsune records.
os.environ.setdefault("KITSUNE_GATE", "0")
# Tests count kernels and captures of given steps; those of the cold start have workers of their own.
os.environ.setdefault("KITSUNE_COMPILE_WORKERS", "0")
# Bits are compared throughout; what reductions in kernels change is the subject of tests that ask for "strict".
os.environ.setdefault("KITSUNE_NUMERICS", "bitwise")
# What is timed differs from run to run; the tests of tuning have a timer of their own.
os.environ.setdefault("KITSUNE_TUNING", "off")

from collections.abc import Iterator

import pytest
import torch

if os.environ.get("KITSUNE_CROSSREF"):
    from tests.crossref import predicted  # noqa: F401  (for every test)

from tests.leaks import leaves_no_memory_behind, pytest_runtest_makereport  # noqa: F401  (for every test)

try:
    import hypothesis
except ImportError:  # a machine with torch and pytest alone runs the rest
    hypothesis = None  # type: ignore[assignment]

if hypothesis is not None:
    # A failure must come back when it is looked for, and a slow machine is not a failure.
    hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
    hypothesis.settings.register_profile("search", derandomize=False, deadline=None, max_examples=1000)
    hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# With xdist there is a worker per core; without, a thread per core is slow whenever anything else runs: a training of
# three steps in test_demo.py took 6 s instead of 0.2 s (4 cores, torch 2.13).
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


# Some compile many kernels, or run under a sanitizer: up to 120 s beside an H200.
SECONDS_ON_A_GPU = 900


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "benchmark" not in config.getoption("markexpr"):
        unasked = pytest.mark.skip(reason="measures time: pytest tests/benchmarks -m benchmark")
        for item in items:
            if "benchmark" in item.keywords:
                item.add_marker(unasked)
    # Where there is a limit, it is of tests on a CPU.
    for item in items if config.getoption("timeout", None) else ():
        if "gpu" in item.keywords and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(SECONDS_ON_A_GPU))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch finds none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def afresh() -> Iterator[None]:
    """Nothing is known before, and nothing is left for others."""
    import kitsune

    kitsune.reset()
    yield
    kitsune.reset()
