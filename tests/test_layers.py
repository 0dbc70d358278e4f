"""Data flows one way: each stage imports `ir` and itself, never another stage; only the composers see all of them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "kitsune"
STAGES = {"dispatch", "lazy", "scheduler", "fusion", "memory", "codegen", "runtime", "amp", "profiler"}
# What each part may import of Kitsune; a part is a folder or a file beside the stages.
ALLOWED: dict[str, set[str]] = {
    "ir": set(),
    # What an option takes is no noun of a stage; it imports nothing itself.
    **{stage: {"accepts", "ir"} for stage in STAGES},
    "accepts": set(),
    "config": {"accepts"},
    "planning": {"config", "ir", *STAGES},
    "hearing": set(),
    "paced_thread": {"hearing", "ir"},
    "background": {"ir", "paced_thread"},
    "garbage": set(),
    "global_hooks": set(),
    "backends": {"background", "config", "ir", *STAGES},
    "engine_options": {"config", "fusion"},
    "plan_files": {"backends", "codegen", "fusion", "ir", "planning", "scheduler"},
    "last_run": {"codegen", "config", "ir", "plan_files", "runtime"},
    "shown": {"backends", "config", "ir", "plan_files", "planning", "profiler", "scheduler"},
    "benefits": {"fusion", "ir", "planning", "runtime"},
    "tuning": {"background", "backends", "ir", *STAGES},
    "ready": {"background", "config", "ir", "tuning", *STAGES},
    "coming": {
        "background",
        "backends",
        "config",
        "ir",
        "last_run",
        "plan_files",
        "planning",
        "ready",
        "runtime",
        "scheduler",
        "shown",
    },
    "joined": {"dispatch", "ir", "ready", "runtime", "scheduler"},
    "pairs": {
        "background",
        "codegen",
        "config",
        "fusion",
        "ir",
        "joined",
        "plan_files",
        "planning",
        "ready",
        "scheduler",
        "shown",
    },
    "running": {
        "background",
        "backends",
        "benefits",
        "coming",
        "config",
        "engine_options",
        "ir",
        "pairs",
        "plan_files",
        "planning",
        "ready",
        "shown",
        "tuning",
        *STAGES,
    },
    "standing_aside": {"background", "runtime"},
    "standing": {"config", "dispatch", "ir", "ready", "running", "runtime"},
    "gate": set(),
    "checking": {"backends", "config", "ir", "planning", "ready", "running", "shown", *STAGES},
    "verifying": {"accepts", "checking", "config", "pipeline", "session"},
    "pipeline": {
        "background",
        "backends",
        "checking",
        "config",
        "engine_options",
        "fusion",
        "garbage",
        "gate",
        "ir",
        "planning",
        "running",
        "standing",
        "standing_aside",
        *STAGES,
    },
    "contexts": {"config", "garbage", "global_hooks", "pipeline", "ir", "dispatch", "lazy"},
    "left_calls": {"contexts", "pipeline"},
    "stance": {"accepts", "config", "contexts"},
    "static": {"config", "contexts", "pipeline", "ir", "lazy", "runtime"},
    "numerics": {"codegen", "config", "ir", "pipeline", "profiler", "scheduler"},
    "disabling": {"contexts", "ir", "lazy"},
    "session": {
        "config",
        "contexts",
        "disabling",
        "engine_options",
        "left_calls",
        "pipeline",
        "ir",
        "dispatch",
        "numerics",
        "profiler",
        "static",
    },
    "binding": {"amp", "config", "contexts", "dispatch", "engine_options", "global_hooks", "session"},
    "attention_rewrite": set(),
    "named_ops": {"engine_options", "ir", "pipeline", "session"},
    "fusing": {"attention_rewrite", "engine_options", "fusion", "ir", "named_ops", "pipeline", "session"},
    "dataflow": {"fusion", "ir", "pipeline", "scheduler"},
    "scaled_backward": {"amp", "contexts"},
    "scaled_step": {"amp"},
    "optimizer_options": {"accepts", "amp", "config", "engine_options", "fusion", "scheduler"},
    "optimizer_profiler": {"contexts", "optimizer_options", "pipeline", "profiler"},
    "optimizer_state": {"accepts"},
    "optimizer": {
        "amp",
        "binding",
        "dataflow",
        "optimizer_options",
        "optimizer_profiler",
        "optimizer_state",
        "profiler",
        "scaled_backward",
        "scaled_step",
    },
    "__init__": {"config", "fusing", "optimizer", "scheduler", "session", "stance", "verifying"},
    "__main__": {"demo"},
    "demo": {"__init__"},
}


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported_parts(source: str) -> Iterator[str]:
    """The parts of Kitsune that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute, so that this test can read them"
            names = [node.module or ""]
        for name in names:
            head, *rest = name.split(".")
            if head == "kitsune":
                yield rest[0] if rest else "__init__"


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_imports_only_what_its_place_allows(path: Path) -> None:
    part = part_of(path)
    assert part in ALLOWED, f"{part} has no row in ALLOWED: decide what it may import"
    wrong = set(imported_parts(path.read_text())) - ALLOWED[part] - {part}
    assert not wrong, f"{path.name} is in {part} and imports {sorted(wrong)}"


def test_the_check_sees_an_import_inside_a_function() -> None:
    assert list(imported_parts("def f():\n    from kitsune.runtime import replay\n")) == ["runtime"]


def test_files_stay_readable() -> None:
    long = {p.name: n for p in files() if (n := len(p.read_text().splitlines())) > 300}
    assert not long, "a file has 100 to 300 lines"
