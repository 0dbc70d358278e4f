"""What the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import kitsune
from kitsune.scheduler import Costs


@pytest.fixture
def every_op_a_kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is left to the library because it would not pay."""
    monkeypatch.setattr(Costs, "alone", lambda self, kernel, has_out_form: True)
    kitsune.reset()
    yield
    kitsune.reset()
