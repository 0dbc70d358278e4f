"""Programs compiled by Triton, for a GPU or for its interpreter, and how to start them."""

import importlib.util
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from kitsune.codegen.cache import KernelFiles
from kitsune.codegen.libdevice import toolkit_libdevice
from kitsune.codegen.render import HEADER, INDEX, parameters_of
from kitsune.codegen.walks import Parameter
from kitsune.ir.plan import Kernel, Program

# 8 elements a thread: one 128-bit access of a 16-bit type, two of float32.
BLOCK = 1024
WARPS = 4
# The roundings of eager's kernels are written out; nothing else is to be contracted or flushed to zero.
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": False, "enable_reflect_ftz": False}


class Compiled:
    """A program for one device. `block` is the number of elements that each block of the grid computes."""

    block = BLOCK

    def __init__(self, path: Path) -> None:
        self.path = path

    def launch(self, grid: int, args: Sequence[Any], stream: int) -> None:
        """Start `grid` blocks. `args` are the program's parameters, pointers as addresses; `stream` is a CUDA stream's handle."""
        raise NotImplementedError

    def load(self) -> None:
        """Bring the code to the device, which a launch does otherwise: not allowed while a CUDA graph is captured."""


class OnDevice(Compiled):
    """Machine code. `kernel` is Triton's CompiledKernel, of which `asm` has every stage."""

    def __init__(self, path: Path, kernel: Any, constants: tuple[Any, ...]) -> None:
        super().__init__(path)
        self.kernel = kernel
        self._constants = constants

    def launch(self, grid: int, args: Sequence[Any], stream: int) -> None:
        kernel = self.kernel
        run = kernel.run  # loads the code at its first use
        run(grid, 1, 1, stream, kernel.function, kernel.packed_metadata, None, None, None, *args, *self._constants)

    def load(self) -> None:
        """Bring the code to the device."""
        assert self.kernel.run is not None  # a property, which loads


class Interpreted(Compiled):
    """Python over CPU memory, element for element what the device would do except for the rounding of library functions."""

    def __init__(self, path: Path, function: Any, types: Sequence[str], constants: tuple[Any, ...]) -> None:
        super().__init__(path)
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
    """

    def __init__(self, directory: str | os.PathLike[str], interpret: bool = False, libdevice: str | None = None) -> None:
        self.files = KernelFiles(directory)
        self.interpret = interpret
        self.libdevice = libdevice or toolkit_libdevice()
        self._compiled: dict[tuple[Any, ...], Compiled] = {}
        self._lock = threading.Lock()

    def compile(self, program: Program, target: torch.device | int, aligned: bool, wide: bool) -> Compiled:
        """The program for a device, or for a compute capability (80, 90), which needs no device.

        `aligned` promises that addresses, sizes and strides are multiples of 16; `wide` computes indices in 64 bits.
        Raises what Triton raises.
        """
        key = (program.text, target, aligned, wide)
        with self._lock:
            found = self._compiled.get(key)
            if found is None:
                found = self._compiled[key] = self._compile(program, target, aligned, wide)
        return found

    def parameters_of(self, kernel: Kernel, slots_in_memory: bool = False) -> tuple[Parameter, ...]:
        """What to pass to the program of another kernel with the same `text_key`."""
        return parameters_of(kernel, slots_in_memory)

    def path_of(self, program: Program) -> Path:
        """The file with the program's source."""
        return self.files.path_of(program.name, self._text(program), f"{self.interpret} {OPTIONS} {self.libdevice}")

    def _text(self, program: Program) -> str:
        return interpreted_text(program.text) if self.interpret else program.text

    def _compile(self, program: Program, target: torch.device | int, aligned: bool, wide: bool) -> Compiled:
        path = self.path_of(program)
        module = _module(path)
        function = getattr(module, program.name)
        constants: dict[str, int] = {"ALIGNED": aligned} if program.batched else {}
        constants |= {"WIDE": wide, "BLOCK": BLOCK}
        types = {name: _type(type_, wide) for name, type_ in module.SIGNATURE.items()}
        values = tuple(constants.values())
        if self.interpret:
            return Interpreted(path, function, list(types.values()), values)
        return OnDevice(path, self._machine_code(module, function, types, constants, target, aligned), values)

    def _machine_code(
        self, module: ModuleType, function: Any, types: dict[str, str], constants: dict[str, Any], target: Any, aligned: bool
    ) -> Any:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        signature = {name: types.get(name, "constexpr") for name in function.arg_names}
        # Arguments are numbered as in the function.
        multiples = module.MULTIPLES if aligned else ()
        attrs = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(function.arg_names) if name in multiples}
        if isinstance(target, torch.device):
            major, minor = torch.cuda.get_device_capability(target)
            target = major * 10 + minor
        options: dict[str, Any] = dict(OPTIONS)
        if self.libdevice:
            options["extern_libs"] = {"libdevice": self.libdevice}
        source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attrs)
        return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def _type(type_: str, wide: bool) -> str:
    if type_ == INDEX:
        return "i64" if wide else "i32"
    return type_


def _module(path: Path) -> ModuleType:
    name = f"kitsune_kernel_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Triton looks a function's globals up by the name of its module.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def interpreted_text(text: str) -> str:
    """A program's text for the interpreter: the same but for where library functions come from."""
    from kitsune.codegen.helpers import HELPERS, INTERPRETED

    header = HEADER.replace("triton.language.extra.cuda import libdevice", "kitsune.codegen import interpreted as libdevice")
    text = text.replace(HEADER, header)
    for name in INTERPRETED:
        text = text.replace(HELPERS[name], f"{name} = libdevice.{name}\n")
    return text
