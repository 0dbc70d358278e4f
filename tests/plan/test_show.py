"""What KITSUNE_DEBUG prints and KITSUNE_DUMP writes, also where there is no GPU; and `kitsune.last_plan()`."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import kitsune
from kitsune.config import config
from kitsune.planning import Planner
from tests.runtime.backends import backend, chain, lazily
from tests.runtime.checked import forget

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    forget()
    yield
    forget()


def product() -> torch.Tensor:
    """A kernel, a library call and another kernel, and a refusal between them."""
    x = torch.arange(24.0).view(4, 6)
    return ((x + 1) * 0.5 @ x.t()).abs() - 2


def run(times: int = 2, **options: Any) -> torch.Tensor:
    with config.patch(**options):
        for _ in range(times):
            with lazily():
                got = product()
    assert torch.equal(got, product())
    return got


# What a level adds to those below it.
SHOWN = {
    1: ("operators, EXIT at ", "test_show.py:"),
    2: ("launches of which 2 are fused kernels", "  s0  mm "),
    3: ("dead_code", "planned in ", "not fused"),
    4: ("import triton", "@triton.jit", "def abs_sub("),
    5: ("recorded\n$0", "return ("),
}


@pytest.mark.parametrize("planned", [False, True], ids=["op by op", "by plan"])
@pytest.mark.parametrize("level", range(6))
def test_each_level_prints_more(level: int, planned: bool, capsys: pytest.CaptureFixture[str]) -> None:
    if planned:
        with backend():
            run(debug=level)
    else:
        run(debug=level)
    printed = capsys.readouterr().err
    for needed, texts in SHOWN.items():
        for text in texts:
            assert (text in printed) is (needed <= level), f"level {level}: {text}"
    assert printed.count("operators, EXIT at ") == (2 if level else 0), "each flush"
    assert printed.count("planned in ") == (1 if level >= 3 else 0), "once a region"


def test_a_region_run_op_by_op_is_planned_only_to_be_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = []
    plan = Planner.plan
    monkeypatch.setattr(Planner, "plan", lambda *args: planned.append(1) or plan(*args))
    run()
    run(debug=1)
    assert not planned
    forget()
    run(dump=str(tmp_path / "off"), fuse=False)
    assert not planned and not (tmp_path / "off").exists()
    forget()
    run(dump=str(tmp_path / "on"))
    assert len(planned) == 1
    assert kitsune.counters()["planned"] == 0 and not kitsune.explain().plans


@pytest.mark.parametrize("planned", [False, True], ids=["op by op", "by plan"])
def test_a_dump_has_graphs_plan_and_kernels_of_each_region(tmp_path: Path, planned: bool) -> None:
    if planned:
        with backend():
            run(dump=str(tmp_path))
    else:
        run(dump=str(tmp_path))
        with config.patch(dump=str(tmp_path)), lazily(warmup=1):
            pass  # another pipeline, which has no region
    (region,) = tmp_path.iterdir()
    assert region.name.startswith("region_")
    passes = [path.name.split("_", 1) for path in sorted(region.glob("*0_*.txt"))]
    assert passes[0] == ["00", "recorded.txt"] and ["10", "dead_code.txt"] in passes
    assert [number for number, _ in passes] == ["00", "10", "20", "30", "40", "50"]
    assert (region / "00_recorded.txt").read_text().startswith("$0: f32[")
    assert "  s0  mm " in (region / "plan.txt").read_text()
    assert " | mm: " in (region / "refusals.txt").read_text()
    dot = (region / "plan.dot").read_text()
    assert dot.startswith("digraph plan {") and dot.endswith("}\n") and "l0 -> l1;" in dot
    assert len(list(region.glob("kernels/*.py"))) == 2


def test_dumped_kernels_can_be_imported(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    run(dump=str(tmp_path))
    for number, path in enumerate(sorted(tmp_path.glob("*/kernels/*.py"))):
        spec = importlib.util.spec_from_file_location(f"dumped_{number}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert callable(getattr(module, path.stem.split("_", 1)[1]).run), path
    assert number == 1


def test_threads_and_pipelines_write_into_folders_of_their_own(tmp_path: Path) -> None:
    for max_pending_ops in (100, 200, 300):
        run(dump=str(tmp_path), max_pending_ops=max_pending_ops)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("planned", [False, True], ids=["op by op", "by plan"])
def test_a_dump_that_cannot_be_written_is_one_sentence(tmp_path: Path, planned: bool, capsys: pytest.CaptureFixture[str]) -> None:
    # A file where the folder would be: root may write anywhere else.
    (tmp_path / "file").write_text("")
    folder = str(tmp_path / "file" / "dump")
    with backend() if planned else kitsune.disable(), config.patch(dump=folder):
        run()
        with lazily():
            got = chain()
    assert torch.equal(got, chain())
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"kitsune: cannot write {folder}/region_")
    assert line.endswith("; set KITSUNE_DUMP to a folder that can be written.")
    assert not kitsune.explain().mended


def test_the_last_plan_is_none_before_any_region() -> None:
    kitsune.reset()
    assert kitsune.last_plan() is None
    run(1)
    assert kitsune.last_plan() is not None
    kitsune.reset()
    assert kitsune.last_plan("sm_80") is None


def test_the_last_plan_is_of_the_region_that_an_optimizer_ended() -> None:
    weight = torch.ones(6, 3, requires_grad=True)
    with lazily():
        (torch.ones(2, 6) @ weight).tanh().sum().backward()
        torch.optim.SGD([weight], lr=0.1).step()
        run(1)
    plan = kitsune.last_plan()
    assert plan is not None
    text = str(plan)
    assert "tanh" in text and "launches" in text
    assert any("sub" in launch.name or "add" in launch.name for launch in plan.launches)
    assert str(kitsune.last_plan("sm_90")) == text


@pytest.mark.parametrize("arch", ["sm_70", "cuda", "90"])
def test_the_last_plan_knows_two_architectures(arch: str) -> None:
    for known in ("sm_80", "sm_90"):
        kitsune.last_plan(known)
    with pytest.raises(ValueError, match=rf"^Kitsune can plan for sm_80 and sm_90, not for '{arch}'\.$"):
        kitsune.last_plan(arch)


@pytest.mark.parametrize(("variable", "value", "seen"), [("FUSE", "0", ""), ("POOL", "0", ""), ("DEBUG", "5", "planned in ")])
def test_the_tiny_programs_work_with_a_variable_set(variable: str, value: str, seen: str) -> None:
    environment = {**os.environ, f"KITSUNE_{variable}": value}
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "tests/test_tiny.py"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert seen in done.stdout + done.stderr
