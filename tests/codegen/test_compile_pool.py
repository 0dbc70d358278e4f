"""Compile workers: processes that leave machine code on disk, and what comes of them when they fail."""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kitsune.codegen import (
    BackgroundCompiler,
    CompilePool,
    Compiler,
    WorkerFailed,
    background as codegen_background,
    default_workers,
    render,
)
from kitsune.codegen.compile_pool import APART_S, CompilationFailed
from kitsune.codegen.compiler import OnDevice
from kitsune.codegen.machine_code import Job, binary_path, compile_binary, read_binary
from kitsune.ir import Pending, Program
from tests.codegen.build import build, compiled_kernel

ROOT = Path(__file__).parent.parent.parent
JOB = Job("kernel.py", "kernel", False, True, False, 90, None)
# Workers that follow a script, for each line they read.
DIES = "import sys; sys.stdin.readline(); sys.exit(3)"
HANGS = "import sys, time; sys.stdin.readline(); time.sleep(600)"
REFUSES = 'import sys\nfor line in sys.stdin: print(\'{"error": "SyntaxError: no"}\', flush=True)'
OBEYS = "import sys\nfor line in sys.stdin: print('{}', flush=True)"


@pytest.fixture
def pools() -> Iterator[Any]:
    made: list[CompilePool] = []

    def pool(script: str | None = None, n: int = 1, timeout: float = 60.0) -> CompilePool:
        made.append(CompilePool(n, timeout, script and [sys.executable, "-c", script]))
        return made[-1]

    yield pool
    for one in made:
        one.close()


def program() -> Program:
    built = build(lambda x: torch.relu(x * 2), [torch.ones(64)], "cold")
    return render(built.kernel)


def now(call: Any) -> None:
    call()


def test_a_worker_that_dies_fails_its_job_and_another_takes_its_place(pools: Any) -> None:
    pool = pools(DIES)
    for _ in range(2):
        with pytest.raises(WorkerFailed, match=r"died \(exit status 3\)"):
            pool.submit(JOB).result(60)
    assert not pool._workers


def test_a_worker_that_hangs_is_ended(pools: Any) -> None:
    pool = pools(HANGS, timeout=0.5)
    with pytest.raises(WorkerFailed, match="no answer for"):
        pool.submit(JOB).result(60)
    assert not pool._workers


def test_a_worker_that_cannot_be_started_fails_its_job() -> None:
    pool = CompilePool(1, command=["/nowhere/python"])
    with pytest.raises(WorkerFailed, match="could not be started"):
        pool.submit(JOB).result(60)


def test_what_the_compiler_says_is_told_and_the_worker_stays(pools: Any) -> None:
    pool = pools(REFUSES)
    for _ in range(3):
        with pytest.raises(CompilationFailed, match="SyntaxError: no"):
            pool.submit(JOB).result(60)
    assert len(pool._workers) == 1


def test_there_are_no_more_workers_than_jobs_and_none_before_the_first(pools: Any) -> None:
    pool = pools(OBEYS, n=8)
    assert not pool._workers
    for future in [pool.submit(JOB) for _ in range(2)]:
        future.result(60)
    assert 1 <= len(pool._workers) <= 2


def test_workers_that_are_expected_to_work_are_there_before_the_first_job(pools: Any) -> None:
    pool = pools(OBEYS, n=3)
    for _ in range(2):
        pool.start()
    until = time.monotonic() + 60
    while len(pool._workers) < 3 and time.monotonic() < until:
        time.sleep(0.01)
    workers = set(pool._workers)
    assert len(workers) == 3
    for future in [pool.submit(JOB) for _ in range(6)]:
        future.result(60)
    assert pool._workers == workers


def test_workers_that_nobody_waits_for_yet_are_started_one_after_the_other(pools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pool, waits = pools(OBEYS, n=3), threading.Semaphore(0)
    waited: list[float] = []

    def begin(seconds: float) -> None:
        waited.append(seconds)
        assert waits.acquire(timeout=60)

    # Not by its name, which is the package's function of that name.
    module = sys.modules[CompilePool.__module__]
    with monkeypatch.context() as patched:
        patched.setattr(module, "time", SimpleNamespace(sleep=begin, monotonic=time.monotonic))
        pool.start()
        until = time.monotonic() + 60
        while len(waited) < 3 and time.monotonic() < until:
            time.sleep(0.01)
        assert sorted(waited) == [0, APART_S, 2 * APART_S] and APART_S > 0
        assert not pool._workers, "they are started behind that"
        # One that has to wait holds nobody up.
        waits.release()
        pool.submit(JOB).result(60)
        waits.release(2)


def test_a_worker_that_cannot_be_started_early_fails_the_first_job() -> None:
    pool = CompilePool(1, command=["/nowhere/python"])
    pool.start()
    with pytest.raises(WorkerFailed, match="could not be started"):
        pool.submit(JOB).result(60)


def test_a_worker_that_waits_keeps_nothing_of_its_last_job(pools: Any) -> None:
    pool, told = pools(OBEYS), threading.Event()
    future = pool.submit(JOB)
    future.add_done_callback(lambda _: told.set())
    gone = weakref.ref(future)
    future.result(60)
    assert told.wait(60)
    del future
    until = time.monotonic() + 60
    while gone() is not None and time.monotonic() < until:
        time.sleep(0.01)
    assert gone() is None


def test_the_largest_are_compiled_first(pools: Any, tmp_path: Path) -> None:
    # The first keeps the only worker until all others are there.
    told, go = tmp_path / "told", tmp_path / "go"
    script = (
        "import json, os, sys, time\nfor line in sys.stdin:\n"
        f"    open({str(told)!r}, 'a').write(json.loads(line)['name'] + ' ')\n"
        f"    while not os.path.exists({str(go)!r}): time.sleep(0.01)\n    print('{{}}', flush=True)"
    )
    pool = pools(script)
    first = pool.submit(JOB)
    until = time.monotonic() + 60
    while not told.exists() and time.monotonic() < until:
        time.sleep(0.01)
    futures = [
        pool.submit(dataclasses.replace(JOB, name=f"{name}"), size) for name, size in zip("abcd", (2, 9, 5, 9), strict=True)
    ]
    go.touch()
    for future in [first, *futures]:
        future.result(60)
    assert told.read_text().split() == ["kernel", "b", "d", "c", "a"]


def test_a_closed_pool_leaves_no_process_and_refuses_jobs(pools: Any) -> None:
    pool = pools(HANGS)
    open_job = pool.submit(JOB)
    until = time.monotonic() + 60
    while not pool._workers and time.monotonic() < until:
        time.sleep(0.01)
    (worker,) = pool._workers
    pool.close()
    assert worker.process.returncode is not None
    with pytest.raises(WorkerFailed):
        open_job.result(60)
    with pytest.raises(WorkerFailed, match="have ended"):
        pool.submit(JOB).result(60)


def test_default_workers_are_few() -> None:
    assert 1 <= default_workers() <= 8


class Held:
    """A pool whose jobs end when the test says so."""

    def __init__(self) -> None:
        self.jobs: list[tuple[Job, Future[None]]] = []

    def submit(self, job: Job, size: int = 0) -> Future[None]:
        self.jobs.append((job, Future()))
        return self.jobs[-1][1]


class Counting(Compiler):
    """Compiles nothing, and has nothing on disk."""

    def _compile(self, *which: Any) -> Any:
        return which


def test_a_program_is_pending_until_it_is_loaded(tmp_path: Path) -> None:
    held, loads = Held(), []
    compiler = BackgroundCompiler(Counting(tmp_path), lambda: held, loads.append)  # type: ignore[arg-type, return-value]
    made = program()
    for _ in range(2):
        with pytest.raises(Pending):
            compiler.compile(made, 90, 16, False)
    ((job, future),) = held.jobs
    assert job.name == made.name and Path(job.path).read_text().startswith(made.text)
    future.set_result(None)
    with pytest.raises(Pending):
        compiler.compile(made, 90, 16, False)
    assert compiler.n_pending == 1
    loads.pop()()
    assert compiler.compile(made, 90, 16, False) is not None and compiler.n_pending == 0


def test_without_a_pool_a_program_is_compiled_at_once(tmp_path: Path) -> None:
    compiler = BackgroundCompiler(Counting(tmp_path), lambda: None, now)
    assert compiler.compile(program(), 90, 16, False) is not None
    assert compiler.ask(program(), 90, 1, False).done()


def test_a_program_that_does_not_compile_raises_what_the_worker_said(tmp_path: Path) -> None:
    held = Held()
    compiler = BackgroundCompiler(Counting(tmp_path), lambda: held, now)  # type: ignore[arg-type, return-value]
    future = compiler.ask(program(), 90, 16, False)
    held.jobs[0][1].set_exception(CompilationFailed("SyntaxError: no"))
    assert isinstance(future.exception(), CompilationFailed)
    with pytest.raises(CompilationFailed):
        compiler.compile(program(), 90, 16, False)


class Loading(Compiler):
    """Tells what is read and loaded, and where."""

    def __init__(self, folder: Path, told: list[str]) -> None:
        super().__init__(folder)
        self.told = told

    def _compile(self, made: Program, *which: Any) -> Any:
        self.told.append(f"read {made.name}")
        return made


def test_programs_are_loaded_together_once_all_are_compiled_or_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, calls, told, now = Held(), [], [], [10.0]

    @contextlib.contextmanager
    def at_a_stretch() -> Iterator[None]:
        told.append("begin")
        yield
        told.append("end")

    monkeypatch.setattr(codegen_background, "_bring", lambda made, target: told.append(f"load {made.name}"))
    compiler = BackgroundCompiler(Loading(tmp_path, told), lambda: held, calls.append, at_a_stretch, lambda: now[0])  # type: ignore[arg-type, return-value]
    programs = [dataclasses.replace(program(), name=name, text=program().text + f"# {name}") for name in "abcdef"]
    futures = [compiler.ask(one, 90, 16, False) for one in programs]

    def end(k: int) -> None:
        held.jobs[k][1].set_result(None)

    end(0)
    calls.pop()()
    assert futures[0].done() and told == ["read a", "begin", "load a", "end"], "the first one is loaded at once"
    told.clear()
    end(1)
    end(2)
    assert not calls, "others are being compiled, and the device was kept from the program a moment ago"
    now[0] += codegen_background.APART_S
    end(3)
    calls.pop()()
    assert told == ["read b", "read c", "read d", "begin", "load b", "load c", "load d", "end"] and not calls
    told.clear()
    end(4)
    held.jobs[5][1].set_exception(CompilationFailed("no"))
    calls.pop()()
    assert [one.done() for one in futures] == [True] * 6 and "load e" in told and futures[5].exception() is not None


def test_who_needs_a_program_that_is_compiled_waits_for_no_other(tmp_path: Path) -> None:
    held, calls, now = Held(), [], [10.0]
    compiler = BackgroundCompiler(Counting(tmp_path), lambda: held, calls.append, clock=lambda: now[0])  # type: ignore[arg-type, return-value]
    for divisibility in (16, 1):
        compiler.ask(program(), 90, divisibility, False)
    compiler.ask(program(), 80, 16, False)
    held.jobs[0][1].set_result(None)
    calls.pop()()
    held.jobs[1][1].set_result(None)
    with pytest.raises(Pending):
        compiler.compile(program(), 90, 1, False)
    assert not calls
    now[0] += codegen_background.APART_S
    with pytest.raises(Pending):
        compiler.compile(program(), 90, 1, False)
    calls.pop()()
    assert compiler.compile(program(), 90, 1, False) is not None and compiler.n_pending == 1


def test_a_program_that_cannot_be_loaded_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, calls = Held(), []

    def bring(made: Any, target: Any) -> None:
        if made.name == "b":
            raise RuntimeError("no room")

    monkeypatch.setattr(codegen_background, "_bring", bring)
    compiler = BackgroundCompiler(Loading(tmp_path, []), lambda: held, calls.append)  # type: ignore[arg-type, return-value]
    programs = [dataclasses.replace(program(), name=name, text=program().text + f"# {name}") for name in "abc"]
    futures = [compiler.ask(one, 90, 16, False) for one in programs]
    for _, job in held.jobs:
        job.set_result(None)
    while calls:
        calls.pop(0)()
    assert [one.exception() is None for one in futures] == [True, False, True]
    with pytest.raises(RuntimeError, match="no room"):
        compiler.compile(programs[1], 90, 16, False)


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    return tmp_path / "triton"


def test_a_worker_leaves_the_code_where_this_process_finds_it(cache: Path, tmp_path: Path, pools: Any) -> None:
    compiler, made = Compiler(tmp_path / "kernels"), program()
    assert not compiler.find(made, 90, 16, False)
    background = BackgroundCompiler(compiler, lambda: pools(), now)
    compiled = background.ask(made, 90, 16, False).result(120)
    assert compiler.find(made, 90, 16, False) and not compiler.find(made, 90, 1, False)
    assert isinstance(compiled, OnDevice) and compiled.binary == read_binary(binary_path(compiler.job_of(made, 90, 16, False)))
    assert compiled.binary.code == compiled_kernel(compiler, made, 90).asm["cubin"]


def test_what_is_on_disk_is_loaded_later_and_asks_no_worker(cache: Path, tmp_path: Path) -> None:
    Compiler(tmp_path / "kernels").compile(program(), 90, 16, False)
    held, loads = Held(), []
    background = BackgroundCompiler(Compiler(tmp_path / "kernels"), lambda: held, loads.append)  # type: ignore[arg-type, return-value]
    with pytest.raises(Pending):
        background.compile(program(), 90, 16, False)
    assert len(loads) == 1 and not held.jobs
    loads.pop()()
    assert isinstance(background.compile(program(), 90, 16, False), OnDevice)
    background.ask(program(), 90, 1, False)
    assert not loads and len(held.jobs) == 1, "the other variant is not on disk"


def test_what_is_on_disk_needs_no_triton(cache: Path, tmp_path: Path) -> None:
    Compiler(tmp_path / "kernels").compile(program(), 90, 16, False)
    code = (
        "import sys; from kitsune.codegen import Compiler; from tests.codegen.test_compile_pool import program\n"
        "made = program(); names = [name for name in sys.modules if name.startswith('triton')]\n"
        "sys.modules.update(dict.fromkeys(names), triton=None)\n"
        f"print(len(Compiler({str(tmp_path / 'kernels')!r}).compile(made, 90, 16, False).binary.code))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert not done.returncode and int(done.stdout) > 1000, done.stderr


@pytest.mark.parametrize("damage", [b"", b"no code", None])
def test_a_damaged_binary_is_compiled_again(cache: Path, tmp_path: Path, damage: bytes | None) -> None:
    compiler = Compiler(tmp_path / "kernels")
    path = binary_path(compiler.job_of(program(), 90, 16, False))
    good = compile_binary(compiler.job_of(program(), 90, 16, False))
    content = path.read_bytes()
    path.write_bytes(content[:-1] if damage is None else damage)
    assert read_binary(path) is None and not compiler.find(program(), 90, 16, False)
    compiled = compiler.compile(program(), 90, 16, False)
    assert isinstance(compiled, OnDevice) and compiled.binary == good == read_binary(path)


def test_what_changes_the_code_changes_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = Compiler(tmp_path / "kernels")
    library = tmp_path / "library.bc"
    library.write_text("one")

    def paths() -> list[Path]:
        jobs = [compiler.job_of(program(), *variant) for variant in ((90, 16, False), (80, 16, False), (90, 1, True))]
        jobs.append(Compiler(tmp_path / "kernels", libdevice=str(library)).job_of(program(), 90, 16, False))
        jobs += [dataclasses.replace(jobs[0], tile=tile) for tile in ((1, 64, 1), (1, 64, 2), (16, 4, 1))]
        return [binary_path(job) for job in jobs]

    found = paths()
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    found += paths()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert paths() == found[-7:] and len(set(found)) == 14
    library.write_text("another")
    assert paths()[3] not in found


def test_a_worker_neither_imports_torch_nor_dies_of_a_bad_kernel(cache: Path, tmp_path: Path, pools: Any) -> None:
    pool = pools()
    probe = tmp_path / "probe.py"
    probe.write_text("import sys\nraise RuntimeError(f\"torch {'torch' in sys.modules}, kitsune {'kitsune' in sys.modules}\")\n")
    with pytest.raises(CompilationFailed, match="RuntimeError: torch False, kitsune False"):
        pool.submit(Job(str(probe), "f", False, True, False, 90, None)).result(120)
    with pytest.raises(CompilationFailed, match="FileNotFoundError"):
        pool.submit(JOB).result(120)
    assert len(pool._workers) == 1


def test_a_cache_folder_that_cannot_be_written_is_told(
    monkeypatch: pytest.MonkeyPatch, cache: Path, tmp_path: Path, pools: Any
) -> None:
    cache.write_text("a file where the folder should be")
    pool = pools()
    with pytest.raises(CompilationFailed, match="Error"):
        pool.submit(Compiler(tmp_path / "kernels").job_of(program(), 90, 16, False)).result(120)


def test_workers_end_with_their_process() -> None:
    # The worker hangs in its job while the process ends, in the ordinary way and killed.
    for end in ("", "os.kill(os.getpid(), 9)"):
        code = (
            "import os, tempfile, time\nfrom kitsune.codegen import CompilePool, machine_code as m\n"
            "pool = CompilePool(1)\n"
            "f = tempfile.NamedTemporaryFile('w', suffix='.py', delete=False)\n"
            "f.write('import time; time.sleep(600)'); f.close()\n"
            "pool.submit(m.Job(f.name, 'f', False, True, False, 90, None))\n"
            "while not pool._workers: time.sleep(0.01)\n"
            "time.sleep(0.5); print(next(iter(pool._workers)).process.pid, flush=True); os.unlink(f.name)\n" + end
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
        assert not done.stderr
        pid, until = int(done.stdout), time.monotonic() + 30
        while _runs(pid) and time.monotonic() < until:
            time.sleep(0.05)
        assert not _runs(pid)


def _runs(pid: int) -> bool:
    try:
        return " Z " not in f" {Path(f'/proc/{pid}/stat').read_text().split()[2]} "
    except OSError:
        return False


def test_import_starts_neither_a_process_nor_a_thread() -> None:
    code = "import threading, torch; before = threading.active_count(); import kitsune; print(threading.active_count() - before)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "0\n"
