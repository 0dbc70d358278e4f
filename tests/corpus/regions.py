"""Regions of random programs, and what is planned for each: a change that is to change no kernel is seen to change none.

    python -m tests.corpus.regions --record 520     records so many regions, of programs of tests/steady/mixed.py
    python -m tests.corpus.regions --accept         writes down what is planned for them now
    python -m tests.corpus.regions --write FOLDER   writes each plan with its kernels: of two commits, look at `diff -r`

`regions.xz` holds the graphs, a line of JSON each; `regions.expected` a line for each of them: a digest of its plan and sources,
and how many launches and kernels the plan has.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import lzma
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import kitsune
from kitsune.codegen import render
from kitsune.ir import Plan, verify
from kitsune.ir.serial import dump_graph, load_graph
from kitsune.planning import Planner
from kitsune.scheduler import RATES, Costs
from kitsune.session import trace_regions

FOLDER = Path(__file__).parent
GRAPHS, EXPECTED = FOLDER / "regions.xz", FOLDER / "regions.expected"
# Shorter ones have little to plan; of the longer ones the models of this folder are made.
SHORTEST, LONGEST = 8, 120
# Of one program, so that many programs have a part.
OF_A_PROGRAM = 2


def texts() -> list[str]:
    """What `dump_graph` wrote of each region."""
    return [json.loads(line) for line in lzma.decompress(GRAPHS.read_bytes()).decode().splitlines()]


def plan_of(text: str) -> Plan:
    """As the default has it on an H200. Raises ValueError if this version of torch lacks one of the operators."""
    return Planner(Costs(RATES["sm_90"]), numerics="strict").plan(load_graph(text))


def written(plan: Plan) -> str:
    """A plan with the sources of its kernels, of each text one."""
    sources = {render(kernel).text: None for launch in plan.launches for kernel in launch.kernels}
    return "\n".join([str(plan), *sources])


def line_of(plan: Plan) -> str:
    """What is written down of a plan."""
    digest = hashlib.sha256(written(plan).encode()).hexdigest()[:16]
    return f"{digest} {plan.n_launches} {sum(len(launch.kernels) for launch in plan.launches)}"


def recorded(seed: int) -> list[str]:
    """The longest regions of a random program, each with another set of operators."""
    from tests.steady.mixed import Parts, Told

    with trace_regions() as graphs, kitsune.config.patch(gate=False):
        parts = Parts(seed)
        Told(parts, parts.on)
    usable = [graph for graph in graphs if graph.outputs and SHORTEST <= len(graph.ops) <= LONGEST]
    distinct = {frozenset(op.target for op in graph.ops): graph for graph in sorted(usable, key=lambda graph: len(graph.ops))}
    for graph in distinct.values():
        verify(graph)
    return [dump_graph(graph) for graph in distinct.values()][-OF_A_PROGRAM:]


def all_recorded() -> Iterator[str]:
    """Of one program after the other, each in a process of its own."""
    from tests.property.machine import apart

    recorded(0)  # what is imported at first is imported here
    for seed in itertools.count():
        yield from apart(recorded, seed) or ()


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=int, default=0)
    parser.add_argument("--accept", action="store_true")
    parser.add_argument("--write", type=Path)
    options = parser.parse_args(given)
    if options.record:
        found: dict[str, str] = {}
        for text in all_recorded():
            # One of those that are planned alike.
            found.setdefault(line_of(plan_of(text)), text)
            print(len(found), end="\r", flush=True)
            if len(found) == options.record:
                break
        GRAPHS.write_bytes(lzma.compress("".join(json.dumps(text) + "\n" for text in found.values()).encode()))
    plans = [plan_of(text) for text in texts()]
    if options.accept:
        EXPECTED.write_text("".join(f"{line_of(plan)}\n" for plan in plans))
    for number, plan in enumerate(plans if options.write else ()):
        options.write.mkdir(parents=True, exist_ok=True)
        (options.write / f"{number:03d}.txt").write_text(written(plan))
    print(f"{len(plans)} plans")
    return 0


if __name__ == "__main__":
    import tests.conftest  # noqa: F401  (its settings are those of the tests)

    sys.exit(main())
