"""Some of the programs that are put together (`mixed.py`): all that they compute, raise and leave is eager's, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest

from tests.steady.mixed import ALL_MODELS, CHANGES, HABITS, LOSSES, OPTIMIZERS, STEPS, WAYS, Parts, verdict

# Each takes 1 s; `python -m tests.steady.mixed` runs thousands. In the last, a backward had used up what an accuracy's mean was
# made of, which the program did not hold, and the mean was made again for its graph.
SEEDS = (*range(16), 1913)


def test_every_part_comes_up() -> None:
    parts = [Parts(seed) for seed in range(2000)]
    assert {one.model for one in parts} == set(ALL_MODELS) and {one.loss for one in parts} == set(LOSSES)
    assert {one.way for one in parts} == set(WAYS) and {one.optimizer for one in parts} == set(OPTIMIZERS)
    assert {name for one in parts for name in one.changes} == set(CHANGES)
    assert {name for one in parts for name in one.habits} == set(HABITS)


@pytest.mark.parametrize("seed", SEEDS)
def test_it_is_eagers(seed: int) -> None:
    found, told = verdict(Parts(seed))
    assert found == "equal", [str(Parts(seed)), *told]


def simple() -> Parts:
    parts = Parts(0)
    parts.model, parts.loss, parts.way, parts.optimizer, parts.batches = "plain", "list", "usual", "foreach Adam", "fresh"
    parts.changes, parts.habits, parts.on, parts.reads = {}, [], "context", False
    return parts


def test_steps_are_replayed() -> None:
    found, told = verdict(simple())
    assert found == "equal" and int(told[0].split()[2]) > STEPS // 2, told


def test_a_difference_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = LOSSES["list"]
    monkeypatch.setitem(LOSSES, "list", lambda t, *given: usual(t, *given) * (1 + 1e-6 * (t.run.way != "eager")))
    found, told = verdict(simple())
    assert found == "different" and "elements differ" in told[1]


def test_an_error_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(t: Any, *given: Any) -> Any:
        raise ValueError(t.run.way)

    monkeypatch.setitem(LOSSES, "list", refused)
    found, told = verdict(simple())
    assert found == "different" and "raised ['ValueError: context'" in told[1]
