"""What a program has needed, on disk: one that starts again has it read, made and loaded beside its first step."""

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from kitsune.codegen.machine_code import read_sealed
from kitsune.config import config
from kitsune.ir import Graph, Op, dump_graph, graph_digest, load_graph
from kitsune.plan_files import kept_path, write_kept
from kitsune.runtime.plan_thread import key_of

# Convolutions, kernels and plans, more than any network has: 0.5 KB and 0.1 KB each.
MOST = 512


class LastRun:
    """Programs are told apart by the operators that they begin with. Nothing that fails here is missed but time.

    `bring(files)` has kernels loaded, soon.
    """

    def __init__(self, bring: Callable[[Sequence[str]], None]) -> None:
        self._bring = bring
        self._path: Path | None = None
        # By what tells them apart, each as text; and the names of the files of kernels and plans.
        self._convolutions: dict[object, str] = {}
        self._kernels: list[str] = []
        self._plans: list[str] = []

    @property
    def is_known(self) -> bool:
        """Has the program begun with something that tells it from others?"""
        return self._path is not None

    def begins(self, first: Sequence[Op]) -> tuple[list[Op], list[Path]]:
        """The convolutions that the program which begins with these has needed, and the files of its plans. Its kernels are
        loaded."""
        self._path, self._convolutions, self._kernels, self._plans = None, {}, [], []
        with suppress(Exception):
            if config.warm_start:
                self._path = kept_path(graph_digest(_alone(first)), "", "run")
                if (content := read_sealed(self._path)) is not None:
                    return self._read(self._path, content)
        return [], []

    def _read(self, path: Path, content: bytes) -> tuple[list[Op], list[Path]]:
        texts, kernels, plans = json.loads(content)
        found = [load_graph(text).ops[0] for text in texts]
        self._convolutions = dict(zip(map(key_of, found), texts, strict=True))
        self._kernels, self._plans = kernels, plans
        with suppress(OSError):  # of a folder that can only be read
            path.touch()
        self._bring(kernels)
        return found, [path.parent / plan for plan in plans]

    def needs_convolutions(self, ops: Iterable[Op]) -> None:
        """It needs these, beside those that are known."""
        new = {key: op for op in ops if (key := key_of(op)) not in self._convolutions}
        if new and self.is_known:
            with suppress(Exception):
                self._convolutions.update({key: dump_graph(_alone([op])) for key, op in new.items()})
                self._write()

    def needs(self, kernels: Sequence[str], plans: Sequence[str]) -> None:
        """It needs these, and no others."""
        if self.is_known and (sorted(kernels) != sorted(self._kernels) or sorted(plans) != sorted(self._plans)):
            self._kernels, self._plans = [*kernels], [*plans]
            self._write()

    def _write(self) -> None:
        content = [list(self._convolutions.values()), self._kernels, self._plans]
        if sum(map(len, content)) <= MOST:
            with suppress(Exception):
                assert self._path is not None
                write_kept(self._path, json.dumps(content).encode())


def _alone(ops: Sequence[Op]) -> Graph:
    """A graph of these, of which nothing else is asked."""
    made = {v.id for op in ops for v in op.outputs}
    inputs = {v.id: v for op in ops for v in op.inputs if v.id not in made}
    return Graph(tuple(inputs.values()), tuple(ops), ())
