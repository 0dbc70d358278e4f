"""Programs compiled by Triton, for a GPU or for its interpreter, and how to start them."""

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch

from kitsune.codegen.cache import KernelFiles, file_stamp
from kitsune.codegen.driver import LoadedKernel
from kitsune.codegen.libdevice import toolkit_libdevice
from kitsune.codegen.machine_code import (
    Binary,
    Job,
    binary_path,
    compile_binary,
    constants_of,
    load_module,
    read_binary,
    types_of,
)
from kitsune.codegen.render import HEADER, parameters_of
from kitsune.ir.plan import Kernel
from kitsune.ir.program import Parameter, Program

# Gives a source its file: by name, text and flags.
PathOf = Callable[[str, str, str], Path]


class Compiled:
    """A program for one device. `block` is the number of elements, or of rows, that each block of the grid computes."""

    def __init__(self, path: Path, block: int) -> None:
        self.path, self.block = path, block

    def launch(self, grid: int, args: Sequence[Any], stream: int) -> None:
        """Start `grid` blocks. `args` are the program's parameters, pointers as addresses; `stream` is a CUDA stream's handle."""
        raise NotImplementedError

    def load(self) -> None:
        """Bring the code to the device, which a launch does otherwise: not allowed while a CUDA graph is captured."""


class OnDevice(Compiled):
    """Machine code for a device; without one it can be looked at, but not started."""

    def __init__(
        self,
        path: Path,
        block: int,
        binary: Binary,
        device: int | None,
        early: Callable[[], bool],
        loaded: LoadedKernel | None = None,
    ) -> None:
        super().__init__(path, block)
        self.binary, self.device, self._early, self._loaded = binary, device, early, loaded

    def launch(self, grid: int, args: Sequence[Any], stream: int) -> None:
        if self._loaded is None:
            self.load()
            assert self._loaded is not None
        self._loaded.launch(grid, args, stream, self._early())

    def load(self) -> None:
        """Bring the code to the device."""
        if self._loaded is None:
            assert self.device is not None, "compiled for a GPU that is not named"
            self._loaded = LoadedKernel(self.binary, self.device)


class Interpreted(Compiled):
    """Python over CPU memory, element for element what the device would do except for the rounding of library functions."""

    def __init__(self, path: Path, block: int, function: Any, types: Sequence[str], constants: tuple[Any, ...]) -> None:
        super().__init__(path, block)
        self._function = function
        self._types = types
        self._constants = constants

    def launch(self, grid: int, args: Sequence[Any], stream: int) -> None:
        import numpy

        from kitsune.codegen.interpreted import argument

        bound = [argument(value, type_) for value, type_ in zip(args, self._types, strict=True)]
        with numpy.errstate(all="ignore"):
            self._function[(grid,)](*bound, *self._constants)


class Compiler:
    """Compiles programs; keeps their sources in `directory`, and what it compiled in memory.

    `interpret` runs them in Triton's interpreter instead, which needs TRITON_INTERPRET=1 before Triton is imported.
    `libdevice` is the bitcode library of math functions; left out, the CUDA toolkit's where it is installed, else Triton's own.
    `early` is asked at each start whether it may begin while the launch before it ends.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        interpret: bool = False,
        libdevice: str | None = None,
        early: Callable[[], bool] = lambda: True,
    ) -> None:
        self.files = KernelFiles(directory)
        self.interpret = interpret
        self.libdevice = libdevice or toolkit_libdevice()
        self._early = early
        self._flags = f"{interpret} {file_stamp(self.libdevice) if self.libdevice else None}"
        self._compiled: dict[tuple[Any, ...], Compiled] = {}
        # What was brought to a device before anybody has asked for it, by the file's name and the device's number; None once
        # somebody has it.
        self._brought: dict[tuple[str, int | None], tuple[Binary, LoadedKernel] | None] = {}
        self._lock = threading.Lock()

    def compile(self, program: Program, target: torch.device | int, divisibility: int, wide: bool) -> Compiled:
        """The program for a device, or for a compute capability (80, 90), which needs no device.

        Above 1, `divisibility` promises that addresses are multiples of 16 bytes, and sizes and strides of so many elements.
        `wide` computes indices in 64 bits.
        Raises what Triton raises.
        """
        key = (program.text, program.tile, target, divisibility, wide)
        with self._lock:
            found = self._compiled.get(key)
            if found is None:
                found = self._compiled[key] = self._compile(program, target, divisibility, wide)
        return found

    def parameters_of(self, kernel: Kernel, slots_in_memory: bool = False) -> tuple[Parameter, ...]:
        """What to pass to the program of another kernel with the same `text_key`."""
        return parameters_of(kernel, slots_in_memory)

    def path_of(self, program: Program) -> Path:
        """The file with the program's source."""
        return self.files.path_of(program.name, self._text(program), self._flags)

    def _text(self, program: Program) -> str:
        return interpreted_text(program.text) if self.interpret else program.text

    def job_of(self, program: Program, target: torch.device | int, divisibility: int, wide: bool) -> Job:
        """What is to be compiled; the program's file is written for it."""
        return self._job(program, target, divisibility, wide, self.files.path_of)

    def _job(self, program: Program, target: torch.device | int, divisibility: int, wide: bool, path_of: PathOf) -> Job:
        if isinstance(target, torch.device):
            major, minor = torch.cuda.get_device_capability(target)
            target = major * 10 + minor
        path = str(path_of(program.name, self._text(program), self._flags))
        tile = astuple(program.tile)
        return Job(path, program.name, program.batched, divisibility, wide, target, self.libdevice, tile)

    def find(self, program: Program, target: torch.device | int, divisibility: int, wide: bool) -> bool:
        """Does its machine code lie on disk? It is read, and `compile` has it."""
        key = (program.text, program.tile, target, divisibility, wide)
        with self._lock:
            if key not in self._compiled:
                job = self._job(program, target, divisibility, wide, self.files.named)
                path = binary_path(job)
                binary, loaded = self._brought.get((path.name, _number_of(target))) or (read_binary(path), None)
                if binary is None:
                    return False
                self._compiled[key] = self._on_device(program, target, job, binary, loaded)
        return True

    def file_of(self, program: Program, target: torch.device | int, divisibility: int, wide: bool) -> str:
        """The name of the file with its machine code."""
        return binary_path(self._job(program, target, divisibility, wide, self.files.named)).name

    def bring(self, file: str, device: int) -> None:
        """Bring what lies in the file of this name to the device of this number, for whoever asks for it later. Raises what the
        driver says, for a file of another device for instance."""
        if (file, device) in self._brought:
            # The program begins once more. Nobody ever takes a kernel off a device.
            return
        if (binary := read_binary(self.files.directory / file)) is not None:
            loaded = LoadedKernel(binary, device)
            with self._lock:
                self._brought.setdefault((file, device), (binary, loaded))

    def _compile(self, program: Program, target: torch.device | int, divisibility: int, wide: bool) -> Compiled:
        if self.interpret:
            path = self.path_of(program)
            values = tuple(constants_of(program.batched, divisibility, wide, astuple(program.tile)).values())
            module = load_module(path)
            types = list(types_of(module, wide).values())
            return Interpreted(path, program.tile.rows, getattr(module, program.name), types, values)
        job = self.job_of(program, target, divisibility, wide)
        return self._on_device(program, target, job, read_binary(binary_path(job)) or compile_binary(job))

    def _on_device(
        self, program: Program, target: torch.device | int, job: Job, binary: Binary, loaded: LoadedKernel | None = None
    ) -> OnDevice:
        device = _number_of(target)
        self._brought[binary_path(job).name, device] = None
        return OnDevice(Path(job.path), program.tile.rows, binary, device, self._early, loaded)


def _number_of(target: torch.device | int) -> int | None:
    """Of a device; a compute capability has none."""
    return (target.index or 0) if isinstance(target, torch.device) else None


def interpreted_text(text: str) -> str:
    """A program's text for the interpreter: the same but for where library functions come from."""
    from kitsune.codegen.helpers import HELPERS, INTERPRETED

    own = "from kitsune.codegen import interpreted as libdevice\n"
    text = text.replace(HEADER, HEADER.replace("from triton.language.extra.cuda import gdc_wait, libdevice\n", own))
    for name in INTERPRETED:
        text = text.replace(HELPERS[name], f"{name} = libdevice.{name}\n")
    return text
