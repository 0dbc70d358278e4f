"""Kernel sources as files, shared by processes: Triton and Python's tracebacks want to read a kernel from a file."""

import atexit
import hashlib
import os
import shutil
import tempfile
import threading
import warnings
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

from kitsune.codegen import machine_code

_SEAL = "# sha256 "
# How the variables begin that change what Triton, LLVM and ptxas make of a source.
SETTINGS = ("TRITON_", "PTXAS_", "NVPTX_", "MLIR_", "LLVM_", "DISABLE_LLVM_", "DISABLE_PTXAS_")


class KernelFiles:
    """Sources in `directory`, one file each, sealed with a checksum. A damaged file counts as none.

    Where the directory cannot be written, a private temporary one takes its place, with one warning.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self._private: Path | None = None
        self._lock = threading.Lock()

    def named(self, name: str, text: str, flags: str = "") -> Path:
        """Where the file with this source is, or would be. `flags` tells apart what is compiled differently."""
        digest = hashlib.sha256("\n".join((text, flags, versions(), settings())).encode()).hexdigest()[:20]
        return self.directory / f"{name[:80]}_{digest}.py"

    def path_of(self, name: str, text: str, flags: str = "") -> Path:
        """The same file, written if it is not there."""
        path, content = self.named(name, text, flags), sealed(text)
        try:
            return _ensure(path, content)
        except OSError as error:
            with self._lock:
                if self.directory == path.parent:  # else another thread has found out
                    self._fall_back(error)
            return _ensure(self.directory / path.name, content)

    def _fall_back(self, error: OSError) -> None:
        if self._private is not None:
            raise error
        self._private = Path(tempfile.mkdtemp(prefix="kitsune-"))
        atexit.register(shutil.rmtree, self._private, ignore_errors=True)
        # First of all: the warning may be raised as an error.
        refused, self.directory = self.directory, self._private
        warnings.warn(
            f"Kernels cannot be kept in {refused} ({error}): they are written to {self._private} for this process. "
            "Name a directory that can be written to keep them.",
            RuntimeWarning,
            stacklevel=4,
        )


def _ensure(path: Path, content: str) -> Path:
    if not is_intact(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
        try:
            with os.fdopen(handle, "w") as file:
                file.write(content)
            # Another process may have written the same in the meantime: either file is right.
            os.replace(temporary, path)
        except OSError:
            Path(temporary).unlink(missing_ok=True)
            raise
    return path


def sealed(text: str) -> str:
    """A text with its checksum as a last line."""
    return f"{text}{_SEAL}{hashlib.sha256(text.encode()).hexdigest()}\n"


def is_intact(path: Path) -> bool:
    """Does the file exist with the checksum of what it holds?"""
    try:
        content = path.read_text()
    except (OSError, UnicodeDecodeError):
        return False
    text, seal, _ = content.rpartition(_SEAL)
    return bool(seal) and content == sealed(text)


def file_stamp(path: str | os.PathLike[str]) -> str:
    """A file's path, and what changes with its content."""
    try:
        found = os.stat(path)
    except OSError:
        return f"{path} missing"
    return f"{path} {found.st_size} {found.st_mtime_ns}"


def settings() -> str:
    """The environment variables that Triton and its tools look at, as they are now, but for those that name folders."""
    named = (name for name in os.environ if name.startswith(SETTINGS) and not name.endswith(("_DIR", "_HOME")))
    return " ".join(f"{name}={os.environ[name]}" for name in sorted(named))


@cache
def versions() -> str:
    """Of everything that has a part in what a source compiles to, this package's own way to compile it included."""
    found = [str(torch.__version__), hashlib.sha256(Path(machine_code.__file__).read_bytes()).hexdigest()]
    for package in ("kitsune-torch", "triton"):
        try:
            found.append(metadata.version(package))
        except metadata.PackageNotFoundError:
            found.append("none")
    return " ".join(found)
