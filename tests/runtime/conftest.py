"""What the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.runtime.checked import forget


@pytest.fixture
def fresh() -> Iterator[None]:
    """Nothing is known of any region, before and afterwards."""
    forget()
    yield
    forget()
