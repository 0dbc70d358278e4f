"""Processes that compile kernels in the background: threads would hold Python's lock for a third of a compiler's time."""

import atexit
import itertools
import json
import os
import queue
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

from kitsune.codegen import machine_code
from kitsune.codegen.machine_code import Job, line_of
from kitsune.ir import quiet

# A kernel takes 50 to 300 ms, the first one of a worker up to a second more.
TIMEOUT = 120.0
# A worker without work keeps 100 MiB.
IDLE = 30.0
# Between the starts of workers that nobody waits for yet. A process is started with Python's lock held: with eight at once
# LeNet's fifth step took 4.4 ms, where those beside it take 1 (H200).
APART_S = 0.01
# Isolated from the user's folder and variables until the path is the same as here, and from this process's script in any case.
_START = "import json, runpy, sys; sys.path[:] = json.loads(sys.argv[3]); runpy.run_path(sys.argv[1], run_name='__main__')"


class WorkerFailed(RuntimeError):
    """A worker could not be started, died or hung: nothing is known of the kernel."""


class CompilationFailed(RuntimeError):
    """What the compiler said of a kernel."""


class _Worker:
    """One process."""

    def __init__(self, command: Sequence[str]) -> None:
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        try:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, bufsize=0
            )
        except (OSError, ValueError) as error:
            raise WorkerFailed(f"A compile worker could not be started ({error}).") from None

    def compile(self, job: Job, timeout: float) -> None:
        """Raises CompilationFailed, WorkerFailed."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(line_of(job))
        except OSError:
            raise self._died() from None
        answer = json.loads(self._line(time.monotonic() + timeout, timeout))
        if "error" in answer:
            raise CompilationFailed(answer["error"])

    def _line(self, until: float, timeout: float) -> bytes:
        assert self.process.stdout is not None
        line = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(max(until - time.monotonic(), 0)):
                    raise WorkerFailed(f"A compile worker gave no answer for {timeout:.0f} s.")
                if not (part := os.read(self.process.stdout.fileno(), 65536)):
                    raise self._died()
                line += part
        return line

    def _died(self) -> WorkerFailed:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        return WorkerFailed(f"A compile worker died (exit status {self.process.poll()}).")

    def end(self) -> None:
        """Leaves neither a process nor a zombie."""
        self.process.kill()
        self.process.wait()

    def close_pipes(self) -> None:
        """Only by who waits at them: a pipe that is closed elsewhere while it is waited for wakes nobody."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


class CompilePool:
    """Up to `n` workers, started when there is work for them or will be. Each has a thread here that waits for its answers."""

    def __init__(self, n: int, timeout: float = TIMEOUT, command: Sequence[str] | None = None) -> None:
        self.n, self.timeout = n, timeout
        self._command = command
        # The largest first, so that none is left for the end; of equals, the first.
        self._jobs: queue.PriorityQueue[tuple[int, int, Job, Future[None]]] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._n_threads = self._n_open = 0
        self._workers: set[_Worker] = set()
        self._closed = False
        self._pid = os.getpid()
        atexit.register(self.close)

    def submit(self, job: Job, size: int = 0) -> "Future[None]":
        """Compile, before what is smaller; the future raises CompilationFailed, WorkerFailed."""
        future: Future[None] = Future()
        with self._lock:
            if self._closed or self._pid != os.getpid():
                future.set_exception(WorkerFailed("The compile workers have ended."))
                return future
            self._n_open += 1
            if self._n_threads < min(self.n, self._n_open):
                self._start(None)
        self._jobs.put((-size, next(self._numbers), job, future))
        return future

    def start(self) -> None:
        """Start the workers, one after the other: there will be jobs for all of them, and the first of each takes 0.5 s longer
        than later ones."""
        with self._lock:
            for k in range(self.n - self._n_threads if not self._closed and self._pid == os.getpid() else 0):
                self._start(k * APART_S)

    def _start(self, after: float | None) -> None:
        """A thread, and its worker so many seconds later; None: with its first job."""
        self._n_threads += 1
        # They outlive idle workers: Linux ends a worker with the thread that has started it.
        threading.Thread(target=self._serve, args=(after,), name="kitsune-compile", daemon=True).start()

    def close(self) -> None:
        """End the workers; what they were at fails."""
        if self._pid != os.getpid():
            return  # a forked child: they are the parent's
        with self._lock:
            self._closed = True
            workers = list(self._workers)
        for worker in workers:
            worker.end()

    def _serve(self, after: float | None) -> None:
        worker: _Worker | None = None
        if after is not None:
            time.sleep(after)
            # Who cannot be started is told of with the first job.
            with suppress(WorkerFailed):
                worker = self._begin()
        while not self._closed:
            try:
                _, _, job, future = self._jobs.get(timeout=IDLE)
            except queue.Empty:
                self._end(worker)
                worker = None
                continue
            # Steps may be being timed, which have these cores.
            quiet.wait(lambda: self._closed)
            error: Exception | None = None
            try:
                with quiet.busy():
                    worker = worker or self._begin()
                    worker.compile(job, self.timeout)
            except CompilationFailed as failure:
                error = failure
            except Exception as failure:
                error = failure if isinstance(failure, WorkerFailed) else WorkerFailed(f"{type(failure).__name__}: {failure}")
                self._end(worker)
                worker = None
            with self._lock:
                self._n_open -= 1
            _settle(future, error)
            # The next job may be long in coming.
            del job, future
        if worker is not None:
            worker.close_pipes()

    def _begin(self) -> _Worker:
        with self._lock:
            if self._closed:
                raise WorkerFailed("The compile workers have ended.")
            worker = _Worker(self._command or _command())
            self._workers.add(worker)
        return worker

    def _end(self, worker: _Worker | None) -> None:
        if worker is not None:
            with self._lock:
                self._workers.discard(worker)
                ours = not self._closed
            if ours:
                worker.end()
            worker.close_pipes()


def _command() -> list[str]:
    if not sys.executable:
        raise WorkerFailed("A compile worker could not be started (sys.executable names no Python).")
    script = str(Path(machine_code.__file__))
    return [sys.executable, "-I", "-c", _START, script, str(os.getpid()), json.dumps(sys.path)]


def _settle(future: "Future[Any]", error: Exception | None) -> None:
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)


def default_workers() -> int:
    """Half of the cores, and a low priority: data loaders want some as well. ResNet-50 has 54 kernels of 0.05 to 0.7 s."""
    affinity = getattr(os, "sched_getaffinity", None)
    n_cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    return min(max(n_cores // 2, 1), 8)


_pools: dict[int, CompilePool] = {}
_pools_lock = threading.Lock()


def compile_pool(n: int) -> CompilePool:
    """The pool of this process with `n` workers."""
    with _pools_lock:
        pool = _pools.get(n)
        if pool is None or pool._pid != os.getpid():
            pool = _pools[n] = CompilePool(n)
    return pool
