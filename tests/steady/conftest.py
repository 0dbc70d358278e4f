"""What the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import kitsune
from tests.steady.loops import deterministic


@pytest.fixture
def repeatable() -> Iterator[None]:
    """Eager gives the same bits each time, and nothing is known of any region."""
    with deterministic():
        yield


@pytest.fixture(params=[0, 1], ids=["warmup=0", "warmup=1"])
def kitsunes(request: pytest.FixtureRequest) -> Iterator[Any]:
    """What makes contexts that record every step, observed first or lazy from the first operator."""
    kitsune.reset()
    with kitsune.config.patch(gate=False):
        yield lambda: kitsune.accelerate(device="cpu", warmup=request.param)
