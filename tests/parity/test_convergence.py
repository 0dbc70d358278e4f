"""The first steps of eight small models on real data: every loss and every parameter is eager's.

`python -m benchmarks.bench_convergence` trains them for 200 steps, in each grade of numerics.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import benchmarks.loss_curves
from benchmarks.bench_convergence import distances, row_of
from benchmarks.loss_curves import DETERMINISM, Curve, curve, determinism
from benchmarks.models import RECIPES
from benchmarks.small_models import SMALL

pytest.importorskip("sklearn")
CPU = torch.device("cpu")
# The third is followed, by call and by backward.
STEPS = 4
# Four of them in 16 bits too: all in each precision would take 40 s.
HALF = {"small-mlp": "amp", "gpt": "amp", "small-vit": "fp16", "recommender": "fp16"}
CASES = [*((name, "fp32") for name in SMALL), *HALF.items()]
EAGER = Curve([2.0, 1.0, 0.5], 0.4, "same", 0, 0)


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_first_steps_are_eagers_bits(name: str, precision: str) -> None:
    expected = curve(name, "eager", CPU, precision, STEPS, size="small")
    got = curve(name, "bitwise", CPU, precision, STEPS, size="small")
    assert (got.losses, got.evaluated, got.digest) == (expected.losses, expected.evaluated, expected.digest)
    assert got.followed > STEPS
    assert len(set(expected.losses)) == STEPS, "each step trains, and has a batch of its own"


def test_another_seed_is_another_training() -> None:
    one, other = (curve("small-mlp", "eager", CPU, "fp32", 2, seed, "small") for seed in (0, 1))
    assert one.losses != other.losses and one.digest != other.digest


def test_a_nudged_training_begins_elsewhere_and_within_what_is_asked_of_strict() -> None:
    eager, nudged = (curve("small-mlp", column, CPU, "fp32", 2, size="small") for column in ("eager", "nudged"))
    assert 0 < max(distances(nudged.losses, eager.losses)) < 1e-3


@pytest.mark.parametrize(
    ("column", "changed", "kept"),
    [
        ("bitwise", {}, True),
        ("bitwise", {"losses": [2.0, 1.0, 0.5000001]}, False),
        ("bitwise", {"digest": "other"}, False),
        ("strict", {"losses": [2.0, 1.0009, 0.5], "digest": "other"}, True),
        ("strict", {"losses": [2.0, 1.0011, 0.5]}, False),
        ("strict", {"losses": [2.0, float("nan"), 0.5]}, False),
        ("fast", {"losses": [3.0, 3.0, 3.0], "evaluated": 0.45}, True),
        ("fast", {"evaluated": 0.51}, False),
        ("fast", {"evaluated": float("nan")}, False),
    ],
)
def test_what_is_asked_of_a_grade(column: str, changed: dict[str, Any], kept: bool) -> None:
    ours = Curve(**{"losses": EAGER.losses, "evaluated": 0.4, "digest": "same", "kernels": 1, "followed": 1, **changed})
    assert row_of(column, ours, EAGER, spread=0.1, bound=1e-3)["kept"] is kept


def test_distances_are_relative_and_nan_beside_nan_is_none() -> None:
    nan = float("nan")
    assert distances([1.5, nan, 2.0, 0.0], [1.0, nan, nan, 0.0]) == [0.5, 0.0, float("inf"), 0.0]


def test_a_name_is_that_of_one_model() -> None:
    assert not SMALL.keys() & RECIPES.keys()


def test_on_random_batches_the_last_turn_of_losses_is_judged() -> None:
    eager = curve("lenet", "eager", CPU, "fp32", 20, size="small")
    assert eager.evaluated == pytest.approx(sum(eager.losses[-16:]) / 16)


@pytest.mark.parametrize(("refuses", "expected"), [(False, DETERMINISM[0]), (True, DETERMINISM[1])])
def test_determinism_is_as_strict_as_a_model_allows(monkeypatch: pytest.MonkeyPatch, refuses: bool, expected: str) -> None:
    whole = benchmarks.loss_curves.train

    def train(*args: Any) -> list[float]:
        if refuses and not torch.is_deterministic_algorithms_warn_only_enabled():
            raise RuntimeError("an_op does not have a deterministic implementation")
        return whole(*args)

    monkeypatch.setattr(benchmarks.loss_curves, "train", train)
    assert determinism("small-mlp", CPU, "fp32", "small") == expected
    assert not torch.are_deterministic_algorithms_enabled()
