"""What runs the plans of a device: its kernels, its graphs, and the workers that compile for it."""

import importlib.util
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from kitsune.background import thread, when_done
from kitsune.codegen import (
    PAGE_PROGRAMS,
    BackgroundCompiler,
    Choices,
    CompilePool,
    Compiler,
    compile_pool,
    default_workers,
    render,
)
from kitsune.config import config
from kitsune.ir import Launch, Program, reads_slots
from kitsune.runtime import CudaGraphs, GraphRecorder, PageReader, SlotTable, Timer, in_turn
from kitsune.runtime.kernel_launch import PreparedLaunch
from kitsune.scheduler import RATES


@dataclass(frozen=True, slots=True)
class Backend:
    """What can run plans: the architecture that they are made for, and what makes a launch of kernels ready to start.

    `prepare_in_graph` does so for a capture, given what it made for ordinary runs and the table with the moving numbers.
    `warm` asks for the programs that what was made will need, and returns futures that are done once they are there, or known
    not to come: without it, or without workers, a program is compiled at its first start. `expect` hears that a region is being
    planned for the first time, so that there will be programs to compile. `choices` are the tiles that were found to be the
    fastest, by `timer`: without them, each launch has the first choice. `file_of` names the file with the machine code of what
    was made, and `bring` has such files brought to the device, soon.
    """

    arch: str
    prepare_launch: Callable[[Launch], Any]
    prepare_in_graph: Callable[[Launch, Any, SlotTable], Any] | None = None
    warm: Callable[[Launch, Any], list[Future[Any]]] | None = None
    expect: Callable[[], None] | None = None
    file_of: Callable[[Any], str | None] = lambda usable: None
    bring: Callable[[Sequence[str]], None] = lambda files: None
    choices: Choices | None = None
    timer: Timer = in_turn
    # What captured graphs begin with; None where the driver copies what comes in.
    reader: PageReader | None = None


def backend_of(device: torch.device) -> Backend | str:
    """What runs plans on a device, or why regions run op by op there."""
    if device.type != "cuda":
        return f"There are no kernels for {device.type}: regions run op by op."
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed, so regions run op by op; `pip install kitsune-torch[triton]` brings it."
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {major}.{minor} and kernels need 8.0 or later, so regions run op by op."
    starts = Compiler(cache_folder(), early=lambda: config.early_starts)
    compiler = BackgroundCompiler(starts, workers, thread.submit, thread.at_a_stretch)
    choices = choices_in(cache_folder(), torch.cuda.get_device_name(device))
    return on_device(nearest_arch(major, minor), compiler, device, choices)


@cache
def choices_in(folder: Path, device_name: str) -> Choices:
    """The choices of this process for devices of a name: what one thread has found out serves them all."""
    return Choices(folder, device_name)


def on_device(arch: str, compiler: BackgroundCompiler, device: torch.device, choices: Choices | None = None) -> Backend:
    """Kernels of a compiler on a device."""

    def prepare(launch: Launch) -> PreparedLaunch:
        # Also for runs that no graph replays: one program to compile, not two. Numbers are copied there when they change.
        in_memory = config.graphs and any(map(reads_slots, launch.ops))
        return PreparedLaunch(launch, program_of(launch, in_memory), compiler, device, slots_in_memory=in_memory)

    def in_graph(launch: Launch, usable: PreparedLaunch, table: SlotTable) -> PreparedLaunch:
        if not usable.differs_in_graph:
            return usable
        made = usable.captured_with(table.address)
        made.load(like=usable)
        return made

    def warm(launch: Launch, usable: PreparedLaunch) -> list[Future[Any]]:
        asked: list[Future[Any]] = [compiler.ask(program, device, 1, False) for program in PAGE_PROGRAMS if config.pages]
        if usable.likely is not None:
            asked.append(compiler.ask(usable.program, device, *usable.likely))
            if usable.program.batched:
                asked.append(_after(asked[-1], usable.reserve))
        return asked

    def file_of(usable: PreparedLaunch) -> str | None:
        return None if usable.likely is None else compiler.file_of(usable.program, device, *usable.likely)

    def bring(files: Sequence[str]) -> None:
        compiler.bring_soon(files, device.index or 0)

    reader = PageReader(PAGE_PROGRAMS, compiler, device)
    return Backend(arch, prepare, in_graph, warm, compiler.expect, file_of, bring, choices, reader=reader)


def _after(future: "Future[Any]", call: Callable[[], None]) -> "Future[None]":
    """Done once the background thread has called it, which it does when the other is done."""
    called: Future[None] = Future()

    def work() -> None:
        # Whatever it is, the program's own start will meet it again.
        with suppress(Exception):
            call()
        called.set_result(None)

    when_done([future], lambda: thread.submit(work))
    return called


def workers() -> CompilePool | None:
    """What compiles in the background; None where kernels are compiled at their first start."""
    n = default_workers() if config.compile_workers is None else config.compile_workers
    return compile_pool(n) if n else None


def recorder_of(device: torch.device) -> GraphRecorder | None:
    """What captures regions of a device; None where nothing can."""
    return CudaGraphs(device) if device.type == "cuda" else None


def reader_of(backend: Backend | str) -> PageReader | None:
    """What the graphs that are captured now begin with; None where the driver copies what comes in."""
    return backend.reader if config.pages and isinstance(backend, Backend) else None


def program_of(launch: Launch, slots_in_memory: bool = False) -> Program:
    """The program of a launch of kernels."""
    written = launch.written
    known = written is not None and written.slots_in_memory == slots_in_memory
    program = written.program if known and written else render(launch.kernels[0], len(launch.kernels) > 1, slots_in_memory)
    return program if launch.tile is None else replace(program, tile=launch.tile)


def nearest_arch(major: int, minor: int) -> str:
    """Rates are known for some devices only; another one is planned for as its nearest older relative."""
    known = [arch for arch in RATES if int(arch.removeprefix("sm_")) <= major * 10 + minor]
    return known[-1] if known else next(iter(RATES))


def pool_budget(device: torch.device) -> int:
    # Arenas that are not in use: enough for the regions of a large step, and little beside what the step itself takes.
    if device.type != "cuda":
        return 1 << 30
    return int(torch.cuda.get_device_properties(device).total_memory) // 4


def cache_folder() -> Path:
    """Where kernels are kept."""
    if config.cache_dir is not None:
        return Path(config.cache_dir)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kitsune"


def arch_here() -> str:
    """The architecture to plan for: that of the GPU that is here and, where there is none, sm_90."""
    if not torch.cuda.is_available():
        return "sm_90"
    return nearest_arch(*torch.cuda.get_device_capability())


def half_of_memory(device: torch.device) -> int:
    """Half of all bytes that a device has, or the host."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 2
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
