"""What the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.steady.loops import deterministic


@pytest.fixture
def repeatable() -> Iterator[None]:
    """Eager gives the same bits each time, and nothing is known of any region."""
    with deterministic():
        yield
