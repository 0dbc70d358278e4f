"""The CUDA toolkit's math library, if it is installed: eager's kernels were built with one, and Triton brings an older one."""

import os
import sysconfig
from functools import cache
from pathlib import Path

import torch

# Whose error function the helper `erf` is. Without CUDA nothing is compared with it.
ERF_OF = ("13", None)


def writes_erf() -> bool:
    """Is the error function of the CUDA that torch was built with known to the last bit, so that no library need be there?"""
    version = torch.version.cuda
    return (version and version.partition(".")[0]) in ERF_OF


@cache
def toolkit_libdevice() -> str | None:
    """The bitcode file of the toolkit whose version torch was built with; None if there is none.

    Triton's own differs in erf, pow, atan, asin, acos, asinh, acosh, erfinv and hypot, by 1 to 3 units in the last place of
    float32; with the toolkit's, these equal eager's in every bit. Of CUDA 13 the error function is a helper, and GELU needs none.
    """
    version = torch.version.cuda
    if version is None:
        return None
    major = version.partition(".")[0]
    roots = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    roots += [
        Path(f"/usr/local/cuda-{version}"),
        Path(sysconfig.get_paths()["purelib"], "nvidia", f"cu{major}"),
        Path("/usr/local/cuda"),
    ]
    for root in roots:
        found = root / "nvvm" / "libdevice" / "libdevice.10.bc"
        if found.is_file() and _is_of(root, version):
            return str(found)
    return None


def _is_of(root: Path, version: str) -> bool:
    """Is this the toolkit of that version? Its folder says so, or the file that it brings."""
    if version in root.resolve().name or root.name.startswith("cu1"):
        return True
    try:
        return f'"version" : "{version}.' in (root / "version.json").read_text()
    except OSError:
        return False
