"""A compiler that holds nobody up: what it has not compiled yet is asked of the workers, and is pending until it is loaded."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kitsune.codegen.compile_pool import CompilePool
from kitsune.codegen.compiler import Compiled, Compiler
from kitsune.ir.plan import Kernel
from kitsune.ir.program import Parameter, Pending, Program

# Seconds between two loads, while something is being compiled. The driver lets nobody start anything on a device that it brings
# a module to until that has done all that it was given: the first of 24 took 88 ms with two or three steps of 33 ms under way,
# and the other 23, right behind it, 14 (H200). ResNet-50 has 69.
APART_S = 0.25


class _Asked(NamedTuple):
    """A program that is asked for."""

    future: "Future[Compiled]"
    program: Program
    target: torch.device | int
    divisibility: int
    wide: bool


class BackgroundCompiler:
    """Compiles as `compiler` does, but in the workers of `pool()`; where that is None, here and at once.

    `later(work)` calls `work()` on another thread, soon: what the workers have compiled is loaded there, many programs at a time,
    inside of `at_a_stretch()`.
    """

    def __init__(
        self,
        compiler: Compiler,
        pool: Callable[[], CompilePool | None],
        later: Callable[[Callable[[], None]], None],
        at_a_stretch: Callable[[], AbstractContextManager[None]] = nullcontext,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.compiler = compiler
        self._pool, self._later, self._at_a_stretch, self._clock = pool, later, at_a_stretch, clock
        self._asked: dict[tuple[Any, ...], Future[Compiled]] = {}
        # What is compiled and not loaded yet, and how many jobs the workers have.
        self._compiled: list[_Asked] = []
        self._n_compiling = 0
        # When the next ones may be loaded before all are compiled.
        self._loads_again = 0.0
        self._lock = threading.Lock()

    def compile(self, program: Program, target: torch.device | int, divisibility: int, wide: bool) -> Compiled:
        """As `Compiler.compile`. Raises Pending until it is there."""
        pool = self._pool()
        if pool is None:
            return self.compiler.compile(program, target, divisibility, wide)
        if self._compiled:
            # Somebody needs one now.
            self._load_soon()
        future = self._ask(pool, program, target, divisibility, wide)
        if not future.done():
            raise Pending(program.name)
        return future.result()

    def ask(self, program: Program, target: torch.device | int, divisibility: int, wide: bool) -> "Future[Compiled]":
        """Have a program compiled. The future is done once it can start without a delay, or never will."""
        pool = self._pool()
        if pool is not None:
            return self._ask(pool, program, target, divisibility, wide)
        done: Future[Compiled] = Future()
        done.set_result(self.compiler.compile(program, target, divisibility, wide))
        return done

    def bring_soon(self, files: Sequence[str], device: int) -> None:
        """Have the machine code in these files brought to a device; a later `ask` for it finds it there."""

        def bring() -> None:
            with self._at_a_stretch():
                for file in files:
                    _outcome(self.compiler.bring, file, device)

        self._later(bring)

    def file_of(self, program: Program, target: torch.device | int, divisibility: int, wide: bool) -> str:
        """The name of the file with its machine code."""
        return self.compiler.file_of(program, target, divisibility, wide)

    def expect(self) -> None:
        """There will be programs to compile: have the workers come."""
        if (pool := self._pool()) is not None:
            pool.start()

    def parameters_of(self, kernel: Kernel, slots_in_memory: bool = False) -> tuple[Parameter, ...]:
        """What to pass to the program of another kernel with the same `text_key`."""
        return self.compiler.parameters_of(kernel, slots_in_memory)

    def path_of(self, program: Program) -> Path:
        """The file with the program's source."""
        return self.compiler.path_of(program)

    @property
    def n_pending(self) -> int:
        """Programs that are still being compiled or loaded."""
        return sum(not future.done() for future in list(self._asked.values()))

    def _ask(
        self, pool: CompilePool, program: Program, target: torch.device | int, divisibility: int, wide: bool
    ) -> "Future[Compiled]":
        key = (program.text, program.tile, target, divisibility, wide)
        # Most are known, and the lock's holder may be resting.
        if (known := self._asked.get(key)) is not None:
            return known
        with self._lock:
            if (known := self._asked.get(key)) is not None:
                return known
            future = self._asked[key] = Future()
        asked = _Asked(future, program, target, divisibility, wide)

        def compiled(made: "Future[None]") -> None:
            error = made.exception()
            if error is not None:
                future.set_exception(error)
            self._load_soon(asked if error is None else None, n_compiled=1)

        try:
            if self.compiler.find(program, target, divisibility, wide):
                self._load_soon(asked)
            else:
                job = self.compiler.job_of(program, target, divisibility, wide)
                made = pool.submit(job, len(program.text))
                with self._lock:
                    self._n_compiling += 1
                made.add_done_callback(compiled)
        except Exception as error:
            future.set_exception(error)
        return future

    def _load_soon(self, asked: _Asked | None = None, n_compiled: int = 0) -> None:
        """Have what is compiled loaded, with this if it is given, once nothing is being compiled, or after a while."""
        with self._lock:
            self._n_compiling -= n_compiled
            if asked is not None:
                self._compiled.append(asked)
            is_time = not self._n_compiling or self._clock() >= self._loads_again
            if not self._compiled or not is_time:
                return
        self._later(self._load)

    def _load(self) -> None:
        with self._lock:
            # Maybe nothing: each of those on disk has this called, and the first call finds them all.
            asked, self._compiled = self._compiled, []
            if asked:
                self._loads_again = self._clock() + APART_S
        # Nobody else may have them before they are loaded: a start would load them. What takes Python's time comes first.
        found = [(one, *_outcome(self.compiler.compile, *one[1:])) for one in asked]
        with self._at_a_stretch():
            loaded = [(one, compiled, error or _outcome(_bring, compiled, one.target)[1]) for one, compiled, error in found]
        for one, compiled, error in loaded:
            if error is None:
                one.future.set_result(compiled)
            else:
                one.future.set_exception(error)


def _outcome(call: Callable[..., Any], *args: Any) -> tuple[Any, Exception | None]:
    """What a call returns, or raises."""
    try:
        return call(*args), None
    except Exception as error:
        return None, error


def _bring(compiled: Compiled, target: torch.device | int) -> None:
    if isinstance(target, torch.device) and target.type == "cuda":
        with torch.cuda.device(target):
            compiled.load()
