"""Programs that differ from the usual training loop in one way each, as people write them: all that they compute and leave is
eager's, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest

import kitsune
from tests.runtime.repeated import counts, graphs
from tests.steady import programs_of_recipes, programs_of_sequences, programs_of_states, programs_of_two, programs_of_weights
from tests.steady.programs import PROGRAMS, STEPS, Run, differences

pytestmark = pytest.mark.usefixtures("repeatable")
MODULES = programs_of_recipes, programs_of_sequences, programs_of_states, programs_of_two, programs_of_weights
# How Kitsune is switched on, and whether all that a step leaves is read after it.
WAYS = [("context", False), ("a context each", True), ("decorator", False), ("optimizer", False), ("all inside", False)]
# No model is called with gradients that belong to the optimizer: nothing begins.
WITHOUT_A_MODEL = "flat_parameters", "kept_views", "master_weights", "merged_adapters", "optimizers_in_hooks", "pictures"
NOT_BEGUN = {(name, "optimizer") for name in ("beam_search", "cached_attention", "evolution", *WITHOUT_A_MODEL)}


def test_all_of_them_are_here() -> None:
    assert {make.__module__ for make in PROGRAMS.values()} == {module.__name__ for module in MODULES}


@pytest.mark.parametrize(("way", "reads"), WAYS)
@pytest.mark.parametrize("name", list(PROGRAMS))
def test_it_is_eagers(name: str, way: str, reads: bool) -> None:
    expected = Run("eager").tell(PROGRAMS[name], reads)
    assert not differences(expected, Run("eager").tell(PROGRAMS[name], reads))
    with kitsune.config.patch(gate=False), graphs(kernels=False):
        assert not differences(expected, Run(way).tell(PROGRAMS[name], reads))
        recorded, replayed, refused = counts("recorded", "replayed", "graph_refused")
    assert not _failed(refused)
    if (name, way) not in NOT_BEGUN:
        assert recorded > STEPS
        # Where steps are read all of them are the same regions.
        assert replayed > STEPS // 2 or not reads


def _failed(refused: dict[str, Any]) -> list[str]:
    return [reason for reason in refused if "failed" in reason]
