"""One sample of each module, optimizer, user's function and custom operator, four times; and the sweep's own bookkeeping.

`make test-full` runs every sample of every dtype.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import kitsune

pytest.importorskip("expecttest", reason="torch's databases need expecttest")

from tests import _moduleinfo, _opinfo
from tests.parity import expected, sights, sweep
from tests.parity.outcomes import differences, run

OTHERS = [*_opinfo.names(("function", "custom")), *_moduleinfo.modules(), *_moduleinfo.optimizers()]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    kitsune.reset()


@pytest.mark.parametrize("name", OTHERS)
def test_first_sample_is_as_in_eager(name: str) -> None:
    sample = next(sights.samples(name, torch.float32), None)
    if sample is None:
        pytest.skip("has no samples in float32")
    verdict = sights.four_sights(sample)
    assert not verdict.differences
    assert not verdict.unstable
    if name not in LEFT_TO_EAGER:
        assert verdict.took_part in ("followed", "recorded")
    else:
        assert verdict.took_part not in ("followed", "recorded"), "takes part by now: take it out of the table"


@pytest.mark.parametrize("name", [name for name in _opinfo.names() if _opinfo.raises(name)])
def test_first_error_is_eagers(name: str) -> None:
    sample = next(_opinfo.error_samples(name, "cpu"), None)
    if sample is None:
        pytest.skip("has no errors on a CPU")
    assert not sights.raised_alike(sample).differences
