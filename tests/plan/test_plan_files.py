"""Plans on disk: the same plan comes back for an equal graph, on today's lines, and nothing else ever does."""

from __future__ import annotations

import dataclasses
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import kitsune
from kitsune import plan_files
from kitsune.backends import program_of
from kitsune.codegen import parameters_of, render
from kitsune.codegen.machine_code import read_sealed, write_sealed
from kitsune.config import config
from kitsune.fusion import FusionConfig, Rules
from kitsune.ir import Graph, Operand, Plan, Result, Slot, Tile, dump_plan, graph_digest, load_plan, reads_slots, verify_plan
from kitsune.plan_files import kept_plan, planned
from kitsune.planning import Planner
from kitsune.scheduler import RATES, Costs, dead_code
from tests.plan.recorded import recorded_again
from tests.plan.test_corpus_plans import FILES, graph_of
from tests.runtime.backends import assert_equal, backend, lazily, loop

ROOT = Path(__file__).parent.parent.parent
H200 = Planner(Costs(RATES["sm_90"]), numerics="strict", slots_in_kernels=True, n_streams=4)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where plans are kept, also small ones."""
    monkeypatch.setattr(plan_files, "WORTH", 1)
    with config.patch(cache_dir=str(tmp_path), verify=False):
        yield tmp_path / "plans"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of operators of the graphs that a planner was asked about."""
    found: list[int] = []
    plan = Planner.plan

    def counted(self: Planner, graph: Graph, show: Any = None) -> Plan:
        found.append(len(graph.ops))
        return plan(self, graph, show)

    monkeypatch.setattr(Planner, "plan", counted)
    return found


def program() -> torch.Tensor:
    x = torch.arange(24.0).view(4, 6)
    y = x * 2  # a line of its own
    return torch.softmax(y.t() @ x, 1).sum(0)


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.plan"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name.partition(".")[0])
def test_a_plan_comes_back_as_it_was(path: Path) -> None:
    old, again = graph_of(path), graph_of(path)
    plan = H200.plan(old)
    back = load_plan(dump_plan(plan, old), again)
    assert str(back) == str(plan) and back.refusals == plan.refusals and back.drops == plan.drops
    assert (dict(back.offsets), back.arena) == (dict(plan.offsets), plan.arena)
    # Each op is launched once, and is one object wherever it is named; the places in the arena are equal anyway.
    verify_plan(back)
    assert [op.site for op in back.graph.ops] == [op.site for op in plan.graph.ops]
    assert (back.n_dead, back.awaited) == (plan.n_dead, plan.awaited) == (len(old.ops) - len(dead_code(old).ops), old.awaited)


def test_an_equal_graph_is_not_planned_again(asked: list[int], folder: Path) -> None:
    first, second = (planned(recorded_again(program), H200) for _ in range(2))
    assert len(asked) == 1 and str(first) == str(second) and len(files(folder)) == 1


def test_lines_are_those_of_today() -> None:
    plan, graph = H200.plan(old := recorded_again(program)), recorded_again(program)
    moved = Graph(
        graph.inputs, tuple(dataclasses.replace(op, site=op.site and op.site._replace(line=7)) for op in graph.ops), graph.outputs
    )
    assert graph_digest(moved) == graph_digest(old)
    sites = [op.site for op in load_plan(dump_plan(plan, old), moved).graph.ops]
    assert len(sites) > 3 and {site.line for site in sites if site is not None} == {7}


@pytest.mark.parametrize("in_args", [True, False])
def test_graphs_are_told_apart_by_every_constant_and_its_type(in_args: bool) -> None:
    graph = recorded_again(lambda: torch.arange(24.0).clamp(max=3))
    (k,) = [k for k, op in enumerate(graph.ops) if op.target._opname == "clamp"]
    constants = [0, 0.0, -0.0, False, None, "0", (0,), [0], torch.Size([0, 0]), Slot(0), Result(0), Operand(0), float("nan")]
    constants += [
        torch.float32,
        torch.device("cpu"),
        torch.strided,
        torch.contiguous_format,
        0j,
        graph.inputs[:1] or graph.ops[0].results,
    ]

    def digest(constant: Any) -> bytes:
        ops = list(graph.ops)
        by_place, by_name = (*ops[k].args[:1], constant), (("max", constant),)
        ops[k] = dataclasses.replace(ops[k], args=by_place) if in_args else dataclasses.replace(ops[k], kwargs=by_name)
        return graph_digest(dataclasses.replace(graph, ops=tuple(ops)))

    assert len({digest(constant) for constant in constants}) == len(constants)
    with pytest.raises(TypeError, match=r"bytes .* cannot be spelled"):
        digest(b"$")
    kept = [dataclasses.replace(graph.ops[k], **{flag: True}) for flag in ("late", "grad_enabled", "derived")]
    more = [graph_digest(dataclasses.replace(graph, ops=(*graph.ops[:k], op, *graph.ops[k + 1 :]))) for op in kept]
    more += [graph_digest(dataclasses.replace(graph, awaited=(1,))), graph_digest(dataclasses.replace(graph, outputs=()))]
    assert len({*more, graph_digest(graph)}) == 6


def others() -> Iterator[tuple[str, Planner]]:
    changed = {"fuel": 1, "toolkit": False, "slots_in_kernels": False, "layouts": False, "n_streams": 1, "numerics": "bitwise"}
    changed["deterministic"] = True
    for name, value in changed.items():
        yield name, dataclasses.replace(H200, **{name: value})
    yield "costs", dataclasses.replace(H200, costs=Costs(RATES["sm_80"]))
    yield "shared", dataclasses.replace(H200, shared=())


@pytest.mark.parametrize(("name", "planner"), list(others()), ids=lambda v: v if isinstance(v, str) else "")
def test_another_planner_is_asked(name: str, planner: Planner, asked: list[int]) -> None:
    planned(recorded_again(program), H200)
    planned(recorded_again(program), planner)
    assert len(asked) == 2


def test_every_field_of_a_planner_is_told_apart() -> None:
    # With two of them nothing is kept, and tiles are those of the day on which a plan is read.
    told = {name for name, _ in others()} | {"verify", "rules", "tiles"}
    assert told == {field.name for field in dataclasses.fields(Planner)}


def test_tiles_are_set_when_a_plan_is_read(asked: list[int]) -> None:
    tile, other = Tile(512, 0, 4), Tile(2048, 0, 8)

    def tiles(by: Callable[[Graph, Planner], Plan | None], tile: Tile | None) -> set[Tile | None]:
        found = by(recorded_again(program), dataclasses.replace(H200, tiles=lambda launch: tile))
        assert found is not None
        return {launch.tile for launch in found.launches if launch.kernels}

    assert [tiles(planned, tile), tiles(planned, other), tiles(kept_plan, tile), tiles(planned, None)] == [
        {tile},
        {other},
        {tile},
        {None},
    ]
    assert len(asked) == 1, "one file serves them all"


@pytest.mark.parametrize("what", ["code", "versions", "default dtype", "a constant", "a size"])
def test_what_the_plan_depends_on_is_told_apart(what: str, asked: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    graph = recorded_again(program)
    planned(graph, H200)
    if what == "code":
        monkeypatch.setattr(plan_files, "_code", lambda: "other")
    elif what == "versions":
        monkeypatch.setattr(plan_files, "versions", lambda: "other")
    elif what == "default dtype":
        monkeypatch.setattr(torch, "get_default_dtype", lambda: torch.float64)
    elif what == "a constant":
        graph = recorded_again(lambda: torch.arange(24.0).view(4, 6).clamp(max=3))
        planned(graph, H200)
        graph = recorded_again(lambda: torch.arange(24.0).view(4, 6).clamp(max=4))
        asked.pop()
    else:
        graph = recorded_again(lambda: torch.arange(30.0).view(5, 6) * 2)
    planned(graph, H200)
    assert len(asked) == 2


@pytest.mark.parametrize("kind", ["verify", "rules", "small", "costs"])
def test_what_is_never_kept(kind: str, asked: list[int], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(Costs):
        __slots__ = ()

    rules = Rules(FusionConfig())
    by_kind = {"verify": {"verify": True}, "rules": {"rules": rules}, "costs": {"costs": Mine(RATES["sm_90"])}, "small": {}}
    if kind == "small":
        monkeypatch.setattr(plan_files, "WORTH", 1000)
    for _ in range(2):
        planned(recorded_again(program), dataclasses.replace(H200, **by_kind[kind]))
    assert len(asked) == 2 and not files(folder)


class Stranger:
    def __reduce__(self) -> Any:
        return os.getenv, ("HOME",)


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps(Stranger()), pickle.dumps((1, 2)), None])
def test_a_file_with_anything_else_in_it_is_written_over(content: bytes | None, asked: list[int], folder: Path) -> None:
    planned(recorded_again(program), H200)
    (path,) = files(folder)
    good = path.read_bytes()
    if content is None:
        path.write_bytes(good[:-1])
    else:
        write_sealed(path, content)
    plan = planned(recorded_again(program), H200)
    assert len(asked) == 2 and plan.n_launches
    assert read_sealed(path) != content and path.read_bytes() != good[:-1]
    assert planned(recorded_again(program), H200).n_launches == plan.n_launches and len(asked) == 2


def test_no_function_is_called_that_a_file_names() -> None:
    with pytest.raises(pickle.UnpicklingError, match=r"os\.getenv is no part of a plan"):
        load_plan(pickle.dumps(Stranger()), recorded_again(program))


def test_a_folder_that_cannot_be_written_costs_nothing_but_the_plan(tmp_path: Path, asked: list[int]) -> None:
    (tmp_path / "file").write_text("")
    with config.patch(cache_dir=str(tmp_path / "file")):
        for _ in range(2):
            assert planned(recorded_again(program), H200).n_launches
    assert len(asked) == 2


def test_a_plan_that_nobody_can_spell_is_as_good(asked: list[int], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> bytes:
        raise pickle.PicklingError

    monkeypatch.setattr(plan_files, "dump_plan", refuse)
    assert planned(recorded_again(program), H200).n_launches and not files(folder)


def test_the_files_read_longest_ago_go_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_files, "MAX_FILES", 3)
    paths = []
    for n in range(5):
        planned(recorded_again(lambda n=n: torch.arange(n + 3.0) * 2 + 1), H200)
        (new,) = set(files(folder)) - set(paths)
        paths.append(new)
        os.utime(new, (n, n))
        if n == 3:
            planned(recorded_again(lambda: torch.arange(4.0) * 2 + 1), H200)  # read again: the second
    assert set(files(folder)) == {paths[1], paths[3], paths[4]}


def test_a_training_runs_by_a_plan_from_disk(asked: list[int], folder: Path) -> None:
    with kitsune.disable():
        expected = loop(lazily())
    n_asked = []
    with backend():
        for _ in range(2):
            kitsune.reset()
            assert_equal(loop(lazily()), expected)
            n_asked.append(len(asked))
            assert kitsune.counters()["kernels"]
    assert n_asked[0] and n_asked[1] == n_asked[0]


def test_another_process_finds_the_plan(folder: Path) -> None:
    code = (
        "import kitsune; from kitsune import plan_files; from kitsune.config import config\n"
        "from tests.plan.test_plan_files import loop, lazily, backend\n"
        "plan_files.WORTH = 1; config.verify = False\n"
        "with backend(): loop(lazily())\n"
    )
    environment = {**os.environ, "KITSUNE_CACHE_DIR": str(folder.parent)}
    seen = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
        assert not done.returncode, done.stderr
        seen.append({path: path.read_bytes() for path in files(folder)})
    assert seen[0] and seen[0] == seen[1]


def test_a_plan_has_the_texts_that_would_be_rendered_for_it(folder: Path) -> None:
    old, again = (graph_of(next(path for path in FILES if path.name.startswith("lenet-small-amp"))) for _ in range(2))
    plan, back = planned(old, H200), kept_plan(again, H200)
    assert back is not None and len(files(folder)) == 1
    n_written = 0
    for launch, read in zip(plan.launches, back.launches, strict=True):
        assert (launch.written is None) == (read.written is None)
        if launch.kernels and read.written is not None:
            n_written += 1
            program = render(launch.kernels[0], len(launch.kernels) > 1, read.written.slots_in_memory)
            rest = [parameters_of(kernel, read.written.slots_in_memory) for kernel in launch.kernels[1:]]
            # As text: -0.0 is another number than 0.0.
            assert repr((read.written.program, read.written.rest)) == repr((program, tuple(rest)))
            assert read.written.slots_in_memory == any(map(reads_slots, launch.ops))
            other = not read.written.slots_in_memory
            # Where numbers are read from memory, they are no parameters.
            assert repr(program_of(read, other)) == repr(render(launch.kernels[0], len(launch.kernels) > 1, other))
    assert n_written == sum(bool(launch.kernels) for launch in plan.launches) > 3
