"""Plans on disk: BERT's takes 1.3 s of Python on an H200's host to make, of which a program that starts again waits for most."""

import hashlib
import platform
from contextlib import suppress
from dataclasses import fields, replace
from functools import cache
from pathlib import Path

import torch

from kitsune.backends import cache_folder
from kitsune.codegen.cache import versions
from kitsune.codegen.machine_code import read_sealed, write_sealed
from kitsune.fusion import ANYTHING
from kitsune.ir import Graph, Plan, dump_plan, graph_digest, load_plan
from kitsune.planning import Planner, no_tile
from kitsune.scheduler import Costs

# Fewer operators are planned in less than 0.05 s.
WORTH = 100
FOLDER = "plans"
# Files that are kept, of up to 1 MB; the ones read longest ago go first.
MAX_FILES = 128


def planned(graph: Graph, planner: Planner) -> Plan:
    """The planner's plan of a graph: from disk if the same version of everything has made it for an equal graph before.

    Tiles are not part of what is kept: they are those that are known when it is read.
    """
    path = _path(graph, planner)
    found = None if path is None else _read(path, graph)
    if found is not None:
        return found.with_tiles(planner.tiles)
    if path is None:
        return planner.plan(graph)
    plan = replace(planner, tiles=no_tile).plan(graph)
    # A plan that cannot be kept, for want of room or because nobody can spell it, is as good as any.
    with suppress(Exception):
        _write(path, dump_plan(plan, graph))
    return plan.with_tiles(planner.tiles)


def may_be_kept(graph: Graph) -> bool:
    """Is it worth the time to look?"""
    return len(graph.ops) >= WORTH and any((cache_folder() / FOLDER).glob("*.plan"))


def kept_plan(graph: Graph, planner: Planner) -> Plan | None:
    """The same, if it need not be made."""
    path = _path(graph, planner) if may_be_kept(graph) else None
    found = None if path is None else _read(path, graph)
    return None if found is None else found.with_tiles(planner.tiles)


def _path(graph: Graph, planner: Planner) -> Path | None:
    """None for a plan that is not kept: it is made quickly, is to be checked, or depends on measurements of this process."""
    plain = type(planner) is Planner and type(planner.costs) is Costs and planner.rules == ANYTHING
    if len(graph.ops) < WORTH or planner.verify or not plain:
        return None
    try:
        digest = graph_digest(graph)
    except TypeError:
        return None
    said = {field.name: getattr(planner, field.name) for field in fields(planner) if field.name != "tiles"}
    said["shared"] = [one.__qualname__ for one in planner.shared]
    made_by = "\n".join((_code(), versions(), platform.python_version(), str(torch.get_default_dtype()), repr(said)))
    return cache_folder() / FOLDER / f"{hashlib.sha256(digest + made_by.encode()).hexdigest()[:32]}.plan"


def _read(path: Path, graph: Graph) -> Plan | None:
    content = read_sealed(path)
    if content is None:
        return None
    try:
        plan = load_plan(content, graph)
        path.touch()
    except Exception:  # whatever a file of other content makes of itself: the plan is made anew, and the file written over
        return None
    return plan


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_sealed(path, content)
    kept = sorted(path.parent.glob("*.plan"), key=_age, reverse=True)
    for old in kept[: max(len(kept) - MAX_FILES, 0)]:
        old.unlink(missing_ok=True)


def _age(path: Path) -> float:
    try:
        return -path.stat().st_mtime
    except OSError:  # another process has removed it
        return 0.0


@cache
def _code() -> str:
    """Changes with any line of this package: a planner that was mended is asked again."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(str(path.name).encode() + path.read_bytes())
    return digest.hexdigest()
