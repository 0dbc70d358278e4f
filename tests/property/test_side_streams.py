"""Training loops on several streams give eager's bits: nothing is computed on, nothing moved ahead of, another one."""

from __future__ import annotations

import pytest

from tests.property.side_streams import told


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("seed", range(12))
def test_loops_on_several_streams_are_as_in_eager(seed: int, device: str) -> None:
    """On a CPU, which has no streams, what is checked is that the loops are sound."""
    verdict, words = told(seed, device)
    assert verdict == "equal", words
