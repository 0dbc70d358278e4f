"""Plans on disk: BERT's takes 1.3 s of Python on an H200's host to make, of which a program that starts again waits for most."""

import hashlib
import platform
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields, replace
from functools import cache, lru_cache
from pathlib import Path

import torch

from kitsune.backends import cache_folder
from kitsune.codegen import write
from kitsune.codegen.cache import versions
from kitsune.codegen.machine_code import read_sealed, write_sealed
from kitsune.fusion import ANYTHING
from kitsune.ir import Graph, Launch, Plan, Program, dump_plan, graph_digest, load_plan_ahead, reads_slots
from kitsune.planning import Planner, no_tile
from kitsune.scheduler import Costs, Pair

# Fewer operators are planned in less than 0.05 s.
WORTH = 100
FOLDER = "plans"
# Files that are kept of each kind, of up to 1 MB; the ones read longest ago go first.
MAX_FILES = 128


def at_once(call: Callable[[], None]) -> None:
    """Call it now."""
    call()


def planned(graph: Graph, planner: Planner, soon: Callable[[Callable[[], None]], None] = at_once) -> Plan:
    """The planner's plan of a graph: from disk if the same version of everything has made it for an equal graph before.

    Tiles are not part of what is kept: they are those that are known when it is read. What writes the file is given to `soon`.
    """
    found = kept_plan(graph, planner)
    if found is not None:
        return found
    path = plan_path(graph, planner)
    if path is None:
        return planner.plan(graph)
    plan = _with_texts(replace(planner, tiles=no_tile).plan(graph), planner.slots_in_kernels)

    def keep() -> None:
        # A plan that cannot be kept, for want of room or because nobody can spell it, is as good as any.
        with suppress(Exception):
            write_kept(path, dump_plan(plan, graph))

    soon(keep)
    return plan.with_tiles(planner.tiles)


def planned_pair(pair: Pair, planner: Planner, soon: Callable[[Callable[[], None]], None] = at_once) -> tuple[Plan, Plan] | None:
    """The planner's plans of a region's two parts: from disk, or made now; None where each is to be planned by itself."""
    whole, paths = pair.whole, pair_paths(pair, planner)
    found = [read_plan(path, whole) for path in paths]
    if len(found) == 2 and found[0] is not None and found[1] is not None:
        return found[0].with_tiles(planner.tiles), found[1].with_tiles(planner.tiles)
    plans = replace(planner, tiles=no_tile).plan_pair(pair)
    if plans is None:
        return None
    if paths:
        plans = _with_texts(plans[0], planner.slots_in_kernels), _with_texts(plans[1], planner.slots_in_kernels)

    def keep() -> None:
        with suppress(Exception):
            for path, plan in zip(paths, plans, strict=True):
                write_kept(path, dump_plan(plan, whole))

    if paths:
        soon(keep)
    return plans[0].with_tiles(planner.tiles), plans[1].with_tiles(planner.tiles)


def pair_paths(pair: Pair, planner: Planner) -> tuple[Path, ...]:
    """The files of the plans of two parts; none where they are not kept."""
    first, second = pair.first, pair.second
    read, left = ([v.id for v in values] for values in (second.inputs, first.outputs))
    parts = len(first.ops), left, sorted(pair.kept), sorted(pair.parameters), read, first.awaited, second.awaited
    paths = [plan_path(pair.whole, planner, repr((parts, number))) for number in range(2)]
    return tuple(path for path in paths if path is not None)


def kept_plan(graph: Graph, planner: Planner) -> Plan | None:
    """The same, if it need not be made."""
    path = plan_path(graph, planner)
    found = None if path is None else read_plan(path, graph)
    return None if found is None else found.with_tiles(planner.tiles)


def plan_path(graph: Graph, planner: Planner, part: str = "") -> Path | None:
    """The file of a plan, or of that of a `part`; None for one that is not kept: it is made quickly, is to be checked, or depends
    on measurements of this process."""
    plain = type(planner) is Planner and type(planner.costs) is Costs and planner.rules == ANYTHING
    if len(graph.ops) < WORTH or planner.verify or not plain:
        return None
    try:
        digest = _digest(graph)
    except TypeError:
        return None
    said = {field.name: getattr(planner, field.name) for field in fields(planner) if field.name != "tiles"}
    said["shared"] = [one.__qualname__ for one in planner.shared]
    return kept_path(digest, "\n".join((str(torch.get_default_dtype()), repr(said), part)), "plan")


def kept_path(digest: bytes, said: str, kind: str) -> Path:
    """The file of a kind that the same version of everything has written for the same."""
    made_by = "\n".join((_code(), versions(), platform.python_version(), said))
    return cache_folder() / FOLDER / f"{hashlib.sha256(digest + made_by.encode()).hexdigest()[:32]}.{kind}"


# A region is looked up, planned and kept: BERT's takes 0.02 s to tell from others (CPU host).
_digest = lru_cache(8)(graph_digest)


def read_plan(path: Path, graph: Graph) -> Plan | None:
    """What a file holds, for the graph that it is for; None if there is none, or it is damaged."""
    found = read_ahead(path)
    if found is None:
        return None
    plan, give_lines = found
    try:
        give_lines(graph)
    except IndexError:  # of another graph
        return None
    return plan


def read_ahead(path: Path) -> tuple[Plan, Callable[[Graph], None]] | None:
    """The same before the graph is there: its lines are given to the plan afterwards."""
    content = read_sealed(path)
    if content is None:
        return None
    try:
        found = load_plan_ahead(content)
        path.touch()
    except OSError:  # of a folder that can only be read
        return found
    except Exception:  # whatever a file of other content makes of itself: the plan is made anew, and the file written over
        return None
    return found


def _with_texts(plan: Plan, slots_in_kernels: bool) -> Plan:
    """The plan with the sources of its kernels, which it takes as long to tell from others as to write."""
    texts: dict[str, str] = {}
    programs: dict[int, Program] = {}

    def with_text(launch: Launch) -> Launch:
        if not launch.kernels or not all(kernel.n_elements for kernel in launch.kernels):
            return launch
        try:
            written = write(launch.kernels, slots_in_kernels and any(map(reads_slots, launch.ops)))
        except Exception:  # said where it is to be started
            return launch
        program = written.program
        if id(program) not in programs:
            # Programs of one text share it in the file. They may differ in parameters that are equal to Python, 0.0 and -0.0.
            programs[id(program)] = replace(program, text=texts.setdefault(program.text, program.text))
        return replace(launch, written=replace(written, program=programs[id(program)]))

    return replace(plan, launches=tuple(map(with_text, plan.launches)))


def write_kept(path: Path, content: bytes) -> None:
    """Write one of these files, and let go of those that were not read for long."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_sealed(path, content)
    kept = sorted(path.parent.glob(f"*{path.suffix}"), key=_age, reverse=True)
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
        digest.update(_named(path))
    return digest.hexdigest()


def _named(path: Path) -> bytes:
    """A file's content behind its name. (A function: at its begin, the thread that works in the background may rest.)"""
    return str(path.name).encode() + path.read_bytes()
