"""Random graphs, plans for them on several streams, and a slow way to find what is not ordered in a plan.

    python -m tests.property.schedules --graphs 10000 --out schedules.jsonl     (`make schedules`)

makes so many graphs, checks the plan of each, leaves out each of its waits in turn, and checks again.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kitsune.ir import (
    Effects,
    Graph,
    Kind,
    Launch,
    Op,
    Operand,
    Plan,
    Result,
    TensorType,
    Value,
    bits,
    default_type,
    happens_before,
    predecessors,
    tensor_type,
    verify,
    verify_plan,
)
from kitsune.memory import assign_offsets, lifetimes
from kitsune.planning import Planner
from kitsune.runtime import takes_memory
from kitsune.scheduler import RATES, Costs, streams

aten = torch.ops.aten
SIDES = (8, 24)
RANDOM = Effects(random=True)
CALLS = {
    "product": (aten.mm.default, Kind.GEMM, 2),
    "sum": (aten.add.Tensor, Kind.POINTWISE, 2),
    "tanh": (aten.tanh.default, Kind.POINTWISE, 1),
    "inverse": (aten.inverse.default, Kind.EXTERN, 1),
}
STEPS = (*CALLS, "product", "sum", "write", "view", "dropout")


class Builder:
    """A graph that grows at random: products, sums, views, writes in place and dropout, on matrices of two sizes."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.ops: list[Op] = []
        self.n_values = 0
        self.versions: list[int] = []
        self.values = {side: [self.new(matrix(side)) for _ in range(2)] for side in SIDES}
        self.inputs = tuple(v for values in self.values.values() for v in values)

    def new(self, type_: TensorType, storage: int | None = None) -> Value:
        if storage is None:
            storage = len(self.versions)
            self.versions.append(0)
        self.n_values += 1
        return Value(self.n_values - 1, type_, storage, self.versions[storage])

    def call(self, target: Any, kind: Kind, args: tuple[Any, ...], *results: Value, **fields: Any) -> None:
        inputs = tuple(a for a in args if isinstance(a, Value))
        structure = Result(0) if len(results) == 1 else tuple(map(Result, range(len(results))))
        self.ops.append(Op(target, kind, args, (), inputs, fields.pop("structure", structure), results, **fields))

    def grow(self) -> None:
        values = self.values[self.rng.choice(SIDES)]
        # The latest are read most, so that some branches are long, and some values are never read again.
        a, b = (values[-1 - min(int(self.rng.expovariate(0.3)), len(values) - 1)] for _ in range(2))
        step = self.rng.choice(STEPS)
        if step == "write":
            self.write(values, a, b)
        elif step == "view":
            old = a.type
            seen = tensor_type(old.dtype, old.shape, old.stride[::-1], old.offset, old.device)
            values.append(self.new(seen, a.storage))
            self.call(aten.t.default, Kind.VIEW, (a,), values[-1])
        elif step == "dropout":
            values.append(self.new(matrix(a.type.shape[0])))
            mask = self.new(matrix(a.type.shape[0], torch.bool))
            self.call(aten.native_dropout.default, Kind.EXTERN, (a, 0.5, True), values[-1], mask, effects=RANDOM)
        else:
            target, kind, n_operands = CALLS[step]
            values.append(self.new(matrix(a.type.shape[0])))
            self.call(target, kind, (a, b)[:n_operands], values[-1])

    def write(self, values: list[Value], a: Value, b: Value) -> None:
        self.versions[a.storage] += 1
        after = self.new(a.type, a.storage)
        fields = {"rewritten": ((a, after),), "effects": Effects(writes=(a.storage,)), "structure": Operand(0)}
        self.call(aten.add_.Tensor, Kind.POINTWISE, (a, b), **fields)
        values[values.index(a)] = after


def matrix(side: int, dtype: torch.dtype = torch.float32) -> TensorType:
    return default_type(dtype, (side, side))


def random_graph(seed: int, most: int = 40) -> Graph:
    builder = Builder(random.Random(seed))
    for _ in range(builder.rng.randint(3, most)):
        builder.grow()
    values = [v for values in builder.values.values() for v in values]
    outputs = dict.fromkeys([*(values[-1] for values in builder.values.values()), *builder.rng.sample(values, 2)])
    graph = Graph(builder.inputs, tuple(builder.ops), tuple(outputs))
    verify(graph)
    return graph


@contextmanager
def forking_freely() -> Iterator[None]:
    """As if forking cost nothing and every launch left the device idle."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "FORK_US", -1e9)
        patch.setattr(streams, "WORTH_A_WORKSPACE", 0)
        yield


def planned(graph: Graph, n_streams: int) -> Plan:
    """As the planner has it: in waves, each of which waits for the one before."""
    with forking_freely():
        return Planner(Costs(RATES["sm_90"]), n_streams=n_streams).plan(graph)


def scattered(plan: Plan, rng: random.Random, n_streams: int) -> Plan:
    """The launches on streams drawn at random, each waiting for what it needs and for nothing else, with memory to match."""
    launches: list[Launch] = []
    for k, needs in enumerate(needed(plan)):
        stream = 0 if plan.launches[k].host_only else rng.randrange(n_streams)
        # The last that it needs of each stream: the others end before.
        last = {launches[n].stream: n for n in bits(needs)}
        waits = tuple(sorted(n for other, n in last.items() if other != stream))
        launches.append(replace(plan.launches[k], stream=stream, waits=waits))
    lives = lifetimes(plan.graph, launches, takes_memory)
    offsets, arena = assign_offsets(lives, happens_before(launches))
    return replace(plan, launches=tuple(launches), offsets=offsets, arena=arena, drops=())


def needed(plan: Plan) -> list[int]:
    """For each launch those whose ops its own ops need, as bits."""
    numbers = {id(op): number for number, op in enumerate(plan.graph.ops)}
    launched = {numbers[id(op)]: k for k, launch in enumerate(plan.launches) for op in launch.ops}
    needs = predecessors(plan.graph)
    found = [0] * len(plan.launches)
    for number, k in launched.items():
        for n in bits(needs[number]):
            found[k] |= 1 << launched[n] if launched[n] != k else 0
    return found


def waits_of(plan: Plan) -> list[tuple[int, int]]:
    return [(k, n) for k, launch in enumerate(plan.launches) for n in launch.waits]


def without(plan: Plan, k: int, n: int) -> Plan:
    """The plan with launch k no longer waiting for launch n."""
    launches = list(plan.launches)
    launches[k] = replace(launches[k], waits=tuple(m for m in launches[k].waits if m != n))
    return replace(plan, launches=tuple(launches))


def reached(launches: Sequence[Launch]) -> list[int]:
    """For each launch, as bits, all that come before it: along its stream, along waits, and along both in turn."""
    found: list[int] = []
    on_stream: dict[int, int] = {}
    for k, launch in enumerate(launches):
        edges = on_stream.get(launch.stream, 0) | sum(1 << n for n in launch.waits)
        on_stream[launch.stream] = on_stream.get(launch.stream, 0) | 1 << k
        found.append(edges)
        for n in bits(edges):
            found[k] |= found[n]
    return found


def conflicts(plan: Plan) -> list[int]:
    """For each launch, as bits, the earlier ones that must not run beside it.

    Such use the same bytes, and one of them writes them or they hold two tensors there; or they need each other anyway.
    """
    used: dict[int, int] = {}
    written: dict[int, int] = {}
    for k, launch in enumerate(plan.launches):
        for storage, writes in () if launch.host_only else uses(launch):
            used[storage] = used.get(storage, 0) | 1 << k
            written[storage] = written.get(storage, 0) | writes << k
    found = needed(plan)
    for storage, mask in used.items():
        for k in bits(mask):
            found[k] |= (mask if written[storage] >> k & 1 else written[storage]) & (1 << k) - 1
    sizes = {v.storage: v.type.nbytes for op in plan.graph.ops for v in op.results if op.kind is not Kind.VIEW}
    where = {s: range(start, start + sizes[s]) for s, start in plan.offsets.items() if s in used}
    for a, here in where.items():
        for b, there in where.items():
            if a != b and here.start < there.stop and there.start < here.stop:
                for k in bits(used[a]):
                    found[k] |= used[b] & (1 << k) - 1
    return found


def uses(launch: Launch) -> set[tuple[int, bool]]:
    if launch.op is not None:
        written = {(v.storage, True) for v in launch.op.outputs}
        return written | {(v.storage, False) for v in launch.op.inputs}
    loads = {(access.value.storage, False) for kernel in launch.kernels for access in kernel.loads}
    return loads | {(store.access.value.storage, True) for kernel in launch.kernels for store in kernel.stores}


def races(plan: Plan, pairs: Sequence[int]) -> bool:
    """Is an earlier launch that must not run beside a later one not before it?"""
    return any(pair & ~before for pair, before in zip(pairs, reached(plan.launches), strict=True))


def is_refused(plan: Plan) -> bool:
    try:
        verify_plan(plan)
    except ValueError:
        return True
    return False


def left_out(plan: Plan, waits: Sequence[tuple[int, int]]) -> Counter[str]:
    """Leave out each of these waits; what the checker says must be what the slow way says."""
    pairs = conflicts(plan)
    counts: Counter[str] = Counter()
    for k, n in waits:
        broken = without(plan, k, n)
        race, caught = races(broken, pairs), is_refused(broken)
        implied = bool(reached(broken.launches)[k] >> n & 1)
        counts["implied" if implied else "needed" if race else "spare"] += 1
        counts["caught"] += caught
        counts["wrong"] += race is not caught or (implied and race)
    return counts


def counted(seed: int) -> Counter[str]:
    """One graph: is each plan of it sound, and is each wait that is left out missed?"""
    rng = random.Random(seed)
    n_streams = rng.randint(2, 4)
    waves = planned(random_graph(seed), n_streams)
    counts: Counter[str] = Counter()
    for plan in (waves, scattered(waves, rng, n_streams)):
        counts["plans"] += 1
        counts["unsound"] += is_refused(plan) or races(plan, conflicts(plan))
        counts += left_out(plan, waits_of(plan))
    return counts


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first graph; the next has the next")
    parser.add_argument("--out", type=Path, help="write the counts to this file, as a line of JSON")
    options = parser.parse_args(given)
    counts = sum((counted(options.seed + n) for n in range(options.graphs)), Counter({"graphs": options.graphs}))
    line = json.dumps(dict(counts))
    print(line)
    if options.out:
        options.out.write_text(line + "\n")
    return 1 if counts["unsound"] or counts["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
