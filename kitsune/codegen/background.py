"""A compiler that holds nobody up: what it has not compiled yet is asked of the workers, and is pending until it is loaded."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from kitsune.codegen.compile_pool import CompilePool
from kitsune.codegen.compiler import Compiled, Compiler
from kitsune.ir.plan import Kernel
from kitsune.ir.program import Parameter, Pending, Program


class BackgroundCompiler:
    """Compiles as `compiler` does, but in the workers of `pool()`; where that is None, here and at once.

    `later(work)` calls `work()` on another thread, soon: what a worker has compiled is loaded there.
    """

    def __init__(
        self,
        compiler: Compiler,
        pool: Callable[[], CompilePool | None],
        later: Callable[[Callable[[], None]], None],
    ) -> None:
        self.compiler = compiler
        self._pool, self._later = pool, later
        self._asked: dict[tuple[Any, ...], Future[Compiled]] = {}
        self._lock = threading.Lock()

    def compile(self, program: Program, target: torch.device | int, aligned: bool, wide: bool) -> Compiled:
        """As `Compiler.compile`. Raises Pending until it is there."""
        pool = self._pool()
        if pool is None:
            return self.compiler.compile(program, target, aligned, wide)
        future = self._ask(pool, program, target, aligned, wide)
        if not future.done():
            raise Pending(program.name)
        return future.result()

    def ask(self, program: Program, target: torch.device | int, aligned: bool, wide: bool) -> "Future[Compiled]":
        """Have a program compiled. The future is done once it can start without a delay, or never will."""
        pool = self._pool()
        if pool is not None:
            return self._ask(pool, program, target, aligned, wide)
        done: Future[Compiled] = Future()
        done.set_result(self.compiler.compile(program, target, aligned, wide))
        return done

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

    def _ask(self, pool: CompilePool, program: Program, target: torch.device | int, *variant: bool) -> "Future[Compiled]":
        key = (program.text, program.tile, target, *variant)
        # Most are known, and the lock's holder may be resting.
        if (known := self._asked.get(key)) is not None:
            return known
        with self._lock:
            if (known := self._asked.get(key)) is not None:
                return known
            future = self._asked[key] = Future()

        def settle() -> None:
            try:
                compiled = self._load(program, target, *variant)
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(compiled)

        def compiled(made: "Future[None]") -> None:
            error = made.exception()
            if error is not None:
                future.set_exception(error)
            else:
                self._later(settle)

        try:
            if self.compiler.find(program, target, *variant):
                self._later(settle)
            else:
                job = self.compiler.job_of(program, target, *variant)
                pool.submit(job, len(program.text)).add_done_callback(compiled)
        except Exception as error:
            future.set_exception(error)
        return future

    def _load(self, program: Program, target: torch.device | int, *variant: bool) -> Compiled:
        # Nobody else may have it before it is loaded: a start would load it.
        compiled = self.compiler.compile(program, target, *variant)
        if isinstance(target, torch.device) and target.type == "cuda":
            with torch.cuda.device(target):
                compiled.load()
        return compiled
