"""A kernel's file made machine code by Triton, here or in a worker: a process that runs this file by itself.

So nothing of Kitsune and no torch is imported here. A worker without torch is there in 0.2 s instead of 1.5 s, and cannot touch
a device. What it compiles lies in Triton's cache afterwards, where this process finds it in 3 ms.
"""

import contextlib
import ctypes
import importlib.util
import json
import os
import signal
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

# The roundings of eager's kernels are written out; nothing else is to be contracted or flushed to zero.
OPTIONS = {"enable_fp_fusion": False, "enable_reflect_ftz": False}
# Elements of a block, no columns, and warps: 8 elements a thread, one 128-bit access of a 16-bit type, two of float32.
ELEMENTS = (1024, 0, 4)
# The type of sizes and strides in a signature: i32, or i64 where an index could pass 2**31.
INDEX = "index"


@dataclass(frozen=True, slots=True)
class Job:
    """A variant of the kernel `name` in the file `path`, for a compute capability (80, 90).

    `tile` are a block's rows, columns and warps; its elements, 0 and warps where nothing is reduced.
    """

    path: str
    name: str
    batched: bool
    aligned: bool
    wide: bool
    target: int
    libdevice: str | None
    tile: tuple[int, int, int] = ELEMENTS


def load_module(path: Path) -> ModuleType:
    """The module with a kernel."""
    name = f"kitsune_kernel_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Triton looks a function's globals up by the name of its module.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def constants_of(batched: bool, aligned: bool, wide: bool, tile: tuple[int, int, int]) -> dict[str, int]:
    """A variant's compile-time arguments, in the order in which a start passes them."""
    blocks = {"XBLOCK": tile[0], "RBLOCK": tile[1]} if tile[1] else {"BLOCK": tile[0]}
    return ({"ALIGNED": aligned} if batched else {}) | {"WIDE": wide} | blocks


def types_of(module: ModuleType, wide: bool) -> dict[str, str]:
    """The types of the other arguments."""
    index = "i64" if wide else "i32"
    return {name: index if type_ == INDEX else type_ for name, type_ in module.SIGNATURE.items()}


def machine_code(job: Job) -> Any:
    """Triton's CompiledKernel, from its cache where it has it. Raises what Triton raises.

    Where the aligned variant cannot be compiled, the one for any addresses takes its place: Triton 3.6 breaks off at some
    kernels with reductions whose operands it knows to be aligned ("operand #1 does not dominate this use").
    """
    refused = Path(f"{job.path}.unaligned")
    if job.aligned and refused.exists():
        job = replace(job, aligned=False)
    try:
        return _machine_code(job)
    except RuntimeError:
        if not job.aligned:
            raise
        made = _machine_code(replace(job, aligned=False))
        with contextlib.suppress(OSError):
            refused.touch()
        return made


def _machine_code(job: Job) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module = load_module(Path(job.path))
    function = getattr(module, job.name)
    types = types_of(module, job.wide)
    signature = {name: types.get(name, "constexpr") for name in function.arg_names}
    # Arguments are numbered as in the function.
    multiples = module.MULTIPLES if job.aligned else ()
    attrs = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(function.arg_names) if name in multiples}
    options: dict[str, Any] = {**OPTIONS, "num_warps": job.tile[2]}
    if job.libdevice:
        options["extern_libs"] = {"libdevice": job.libdevice}
    constants = constants_of(job.batched, job.aligned, job.wide, job.tile)
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attrs)
    return triton.compile(source, target=GPUTarget("cuda", job.target, 32), options=options)


def line_of(job: Job) -> bytes:
    """A job as what a worker reads."""
    return json.dumps(asdict(job)).encode() + b"\n"


def work(parent: int) -> None:
    """A worker's life: a job per line in, an answer per line out, until there is no more or the parent has died."""
    _die_with(parent)
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    # What compilers print is nobody's answer.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for line in sys.stdin.buffer:
        answer = {}
        try:
            machine_code(Job(**json.loads(line)))
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer).encode() + b"\n")


def _die_with(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program, which ends its workers
    # The program's own threads and its data loaders come first.
    with contextlib.suppress(OSError):
        os.nice(10)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG; elsewhere than on Linux the end of stdin must do
    if os.getppid() != parent:
        sys.exit()


if __name__ == "__main__":
    work(int(sys.argv[2]))
