"""Recorded steps, planned again: sound under any costs, the same each time, with the launches written down here."""

from __future__ import annotations

import gzip
import random
from pathlib import Path

import pytest

from kitsune.ir import Graph, Kernel, load_graph
from kitsune.planning import Planner
from kitsune.scheduler import RATES, Costs

CORPUS = Path(__file__).parent.parent / "corpus"
FILES = sorted(CORPUS.glob("*.jsonl.gz"))


def graph_of(path: Path) -> Graph:
    try:
        return load_graph(gzip.decompress(path.read_bytes()).decode())
    except ValueError as error:
        pytest.skip(str(error))


class RandomCosts(Costs):
    """Says yes and no as a die falls."""

    __slots__ = ("die",)

    def __init__(self, seed: int) -> None:
        super().__init__(RATES["sm_90"])
        object.__setattr__(self, "die", random.Random(seed))

    def joining(self, saved_bytes: int, saved_launches: int) -> bool:
        return self.die.random() < 0.7

    def batching(self, kernel: Kernel) -> bool:
        return self.die.random() < 0.7

    def alone(self, kernel: Kernel, has_out_form: bool) -> bool:
        return self.die.random() < 0.5


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name.partition(".")[0])
@pytest.mark.parametrize("seed", [1, 2])
def test_a_plan_is_sound_whatever_the_costs(path, seed):
    # verify_plan: each op once, in an order that the graph allows, and no two living storages on one byte.
    plan = Planner(RandomCosts(seed), verify=True).plan(graph_of(path))
    assert sum(len(launch.ops) for launch in plan.launches) >= 1


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name.partition(".")[0])
def test_the_same_graph_gets_the_same_plan(path):
    texts = [str(Planner(Costs(RATES["sm_90"]), verify=True).plan(graph_of(path))) for _ in range(2)]
    assert texts[0] == texts[1]
