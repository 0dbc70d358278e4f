"""A kernel's file made machine code by Triton, here or in a worker: a process that runs this file by itself.

So nothing of Kitsune and no torch is imported here. A worker without torch is there in 0.2 s instead of 1.5 s, and cannot touch
a device. What it compiles lies in a file beside the kernel's afterwards, which any process reads without Triton.
"""

import contextlib
import ctypes
import hashlib
import importlib.util
import json
import os
import re
import signal
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

# The roundings of eager's kernels are written out; nothing else is to be contracted or flushed to zero.
OPTIONS = {"enable_fp_fusion": False, "enable_reflect_ftz": False}
# Elements of a block, no columns, and warps: 8 elements a thread, one 128-bit access of a 16-bit type, two of float32.
ELEMENTS = (1024, 0, 4)
# The divisibility at which any type is accessed 128 bits at a time.
ALIGNED = 16
# The type of sizes and strides in a signature: i32, or i64 where an index could pass 2**31.
INDEX = "index"
# From this compute capability on a kernel may be started early: its text waits, before it reads or writes what another kernel
# may have to do with, for all that its launch has to come after.
EARLY_FROM = 90
# How parameters lie in memory, in the words of `struct`; all others are addresses.
LAYOUT = {"i32": "i", "i64": "q", "fp32": "f", "fp64": "d"}


@dataclass(frozen=True, slots=True)
class Job:
    """A variant of the kernel `name` in the file `path`, for a compute capability (80, 90).

    With a `divisibility` above 1, addresses are multiples of 16 bytes, and sizes and strides of so many elements.
    `tile` are a block's rows, columns and warps; its elements, 0 and warps where nothing is reduced.
    """

    path: str
    name: str
    batched: bool
    divisibility: int
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


def constants_of(batched: bool, divisibility: int, wide: bool, tile: tuple[int, int, int], target: int = 0) -> dict[str, int]:
    """A variant's compile-time arguments, in the order in which a start passes them; without a target for the interpreter."""
    blocks = {"XBLOCK": tile[0], "RBLOCK": tile[1]} if tile[1] else {"BLOCK": tile[0]}
    aligned = {"ALIGNED": divisibility == ALIGNED} if batched else {}
    return aligned | {"EARLY": target >= EARLY_FROM, "WIDE": wide} | blocks


def types_of(module: ModuleType, wide: bool) -> dict[str, str]:
    """The types of the other arguments."""
    index = "i64" if wide else "i32"
    return {name: index if type_ == INDEX else type_ for name, type_ in module.SIGNATURE.items()}


@dataclass(frozen=True, slots=True)
class Binary:
    """Machine code, and what it takes to start it: the function's name, how its parameters lie in memory in the words of
    `struct`, those that the compiler has added and that are given zeros, warps of a block, bytes of shared memory, and may its
    blocks come to the device before what the launch has to come after is over?"""

    name: str
    parameters: str
    added: str
    warps: int
    shared: int
    early: bool
    code: bytes

    def write(self, path: Path) -> None:
        """Keep it."""
        fields = (self.name, self.parameters, self.added, self.warps, self.shared, self.early)
        write_sealed(path, json.dumps(fields).encode() + b"\n" + self.code)


def read_binary(path: Path) -> Binary | None:
    """What a file holds; None if there is none, or it is damaged."""
    content = read_sealed(path)
    if content is None:
        return None
    fields, _, code = content.partition(b"\n")
    name, parameters, added, warps, shared, early = json.loads(fields)
    return Binary(name, parameters, added, warps, shared, early, code)


def write_sealed(path: Path, content: bytes) -> None:
    """Write a file with a checksum, whole or not at all."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(content).digest() + content)
        os.replace(temporary, path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_sealed(path: Path) -> bytes | None:
    """What `write_sealed` wrote; None if there is no such file, or it is damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    seal, content = content[:32], content[32:]
    return content if hashlib.sha256(content).digest() == seal else None


def binary_path(job: Job) -> Path:
    """The file with a variant's machine code, beside its source."""
    variant = "" if job.divisibility == 1 else "a" if job.divisibility == ALIGNED else f"a{job.divisibility}"
    variant += "w" * job.wide
    return Path(job.path).with_suffix(f".{job.target}{variant}.{'x'.join(map(str, job.tile))}.bin")


def compile_binary(job: Job) -> Binary:
    """Compile a variant and keep it in its file. Raises what Triton raises, and OSError.

    Where one with a divisibility cannot be compiled, the one for any sizes takes its place: Triton 3.6 breaks off at some
    kernels with reductions whose operands it knows to be aligned ("operand #1 does not dominate this use").
    """
    try:
        made = _binary(job, machine_code(job))
    except RuntimeError:
        if job.divisibility == 1:
            raise
        other = replace(job, divisibility=1)
        made = _binary(other, machine_code(other))
    made.write(binary_path(job))
    return made


def _binary(job: Job, kernel: Any) -> Binary:
    """What is kept of a CompiledKernel."""
    metadata = kernel.metadata
    if getattr(metadata, "global_scratch_size", 0) or getattr(metadata, "profile_scratch_size", 0):
        raise RuntimeError(f"{job.name} wants scratch memory, which nobody gives it.")
    parameters = "".join(LAYOUT.get(type_, "Q") for type_ in types_of(load_module(Path(job.path)), job.wide).values())
    if "ptx" not in kernel.asm:
        raise RuntimeError("Triton kept no PTX, which says what parameters a kernel takes: unset TRITON_STORE_BINARY_ONLY.")
    head = re.search(rf"\.entry\s+{re.escape(metadata.name)}\s*\((.*?)\)", kernel.asm["ptx"], re.DOTALL)
    # Behind those of the signature come addresses of scratch memory, as many as this version of Triton passes.
    n_added = (head[1].count(".param") if head else 0) - len(parameters)
    if n_added < 0:
        raise RuntimeError(f"{job.name} has {n_added + len(parameters)} parameters in PTX and {len(parameters)} in its text.")
    code = kernel.asm["cubin"]
    early = job.target >= EARLY_FROM
    return Binary(metadata.name, parameters, "Q" * n_added, metadata.num_warps, metadata.shared, early, code)


def machine_code(job: Job) -> Any:
    """Triton's CompiledKernel, of which `asm` has every stage. Raises what Triton raises."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module = load_module(Path(job.path))
    function = getattr(module, job.name)
    types = types_of(module, job.wide)
    signature = {name: types.get(name, "constexpr") for name in function.arg_names}
    # Arguments are numbered as in the function.
    multiples = [name for name in function.arg_names if name in module.MULTIPLES] if job.divisibility > 1 else []
    of = {name: ALIGNED if types.get(name, "").startswith("*") else job.divisibility for name in multiples}
    attrs = {(i,): [["tt.divisibility", of[name]]] for i, name in enumerate(function.arg_names) if name in of}
    options: dict[str, Any] = {**OPTIONS, "num_warps": job.tile[2]}
    if job.libdevice:
        options["extern_libs"] = {"libdevice": job.libdevice}
    constants = constants_of(job.batched, job.divisibility, job.wide, job.tile, job.target)
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
    # The first job need not wait for it, if there is none yet.
    with contextlib.suppress(Exception):
        import triton.backends.compiler
        import triton.compiler  # noqa: F401
    for line in sys.stdin.buffer:
        answer = {}
        try:
            compile_binary(Job(**json.loads(line)))
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
