"""What KITSUNE_DEBUG prints and KITSUNE_DUMP writes: graphs after each pass, plans with their refusals, kernels."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from kitsune.ir import Barrier, Graph, Plan, Program, Site

# The levels of KITSUNE_DEBUG.
FLUSHES, LAUNCHES, PASSES, KERNELS, GRAPHS = range(1, 6)
# Folders that could not be written, which is said once.
_refused: set[Path] = set()


@dataclass
class Show:
    """Prints to `out` what `level` asks for, and writes everything into `folder` if there is one."""

    level: int
    folder: Path | None = None
    out: TextIO = field(default_factory=lambda: sys.stderr)
    n_passes: int = 0

    @property
    def wanted(self) -> bool:
        """Does anybody want to see how a region is planned?"""
        return self.level >= LAUNCHES or self.folder is not None

    def region(self, graph: Graph, number: int) -> "Show":
        """The same for one region, in a folder of its own."""
        folder = None if self.folder is None or self.folder in _refused else self.folder / f"region_{number:04d}"
        one = Show(self.level, folder, self.out)
        one._write("00_recorded.txt", str(graph))
        if self.level >= GRAPHS:
            self._print(f"recorded\n{graph}")
        return one

    def flush(self, n_ops: int, cause: Barrier, site: Site | None) -> None:
        """A region was closed."""
        if self.level >= FLUSHES:
            self._print(f"kitsune: {n_ops} operators, {cause.name} at {site or '(no Python line)'}")

    def captured(self, n_ops: int, nbytes: int) -> None:
        """A region was captured as a CUDA graph."""
        if self.level >= FLUSHES:
            self._print(f"kitsune: {n_ops} operators captured as a CUDA graph, which keeps {nbytes / 2**20:.1f} MiB")

    def fused(self, n_ops: int, n_kernels: int) -> None:
        """A region's kernels are there."""
        if self.level >= FLUSHES:
            self._print(f"kitsune: {n_ops} operators are run by plan from here on, with {n_kernels} kernels")

    def passed(self, name: str, graph: Graph, seconds: float) -> None:
        """A pass is done."""
        self.n_passes += 1
        self._write(f"{self.n_passes}0_{name}.txt", str(graph))
        if self.level >= PASSES:
            self._print(f"  {name:24s} -> {len(graph.ops):5d} operators, {seconds * 1e3:7.2f} ms")
        if self.level >= GRAPHS:
            self._print(str(graph))

    def plan(self, plan: Plan, seconds: float) -> None:
        """A region is planned."""
        self._write("plan.txt", str(plan))
        self._write("refusals.txt", "\n".join(f"{r.before} | {r.op}: {r.reason}" for r in plan.refusals))
        self._write("plan.dot", plan_dot(plan))
        if self.level >= PASSES:
            self._print(f"planned in {seconds * 1e3:.1f} ms\n{plan}")
        elif self.level >= LAUNCHES:
            self._print("\n".join(line for line in str(plan).partition("\nnot fused")[0].splitlines()))

    def programs(self, programs: Iterable[Program]) -> None:
        """The kernels of a plan, once each."""
        seen = set()
        for program in programs:
            if program.text in seen:
                continue
            seen.add(program.text)
            self._write(f"kernels/{len(seen):02d}_{program.name}.py", program.text)
            if self.level >= KERNELS:
                self._print(program.text)

    def _print(self, text: str) -> None:
        print(text, file=self.out)

    def _write(self, name: str, text: str) -> None:
        if self.folder is None:
            return
        path = self.folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n")
        except OSError as error:
            self._print(f"kitsune: cannot write {path} ({error.strerror}); set KITSUNE_DUMP to a folder that can be written.")
            _refused.add(self.folder.parent)
            self.folder = None


def plan_dot(plan: Plan) -> str:
    """The plan as a graph for Graphviz: launches, and the storages that lead from one to the next."""
    lines = ["digraph plan {", "  node [shape=box, fontname=monospace];"]
    writer: dict[int, int] = {}
    for k, launch in enumerate(plan.launches):
        if launch.host_only:
            continue
        lines.append(f'  l{k} [label="{k}: {launch.name}\\n{launch.nbytes / 2**20:.2f} MiB"];')
        ops = launch.ops
        sources = {writer[v.storage] for op in ops for v in op.inputs if v.storage in writer} - {k}
        lines += [f"  l{source} -> l{k};" for source in sorted(sources)]
        writer.update((v.storage, k) for op in ops for v in op.outputs)
    return "\n".join([*lines, "}"])
