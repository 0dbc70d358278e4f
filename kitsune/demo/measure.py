"""Deterministic runs, and peak memory measured so that two runs in one process can be compared."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass
class Peak:
    """Filled when the measured block ends; None where it cannot be measured."""

    nbytes: int | None = None


def how_peak_is_measured(device: torch.device) -> str:
    if device.type == "cuda":
        return "torch.cuda.max_memory_allocated during the training"
    return "growth of the process's resident memory to its peak in training (VmHWM, reset before each training)"


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    peak = Peak()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.nbytes = torch.cuda.max_memory_allocated(device)
        return
    before = _reset_resident_peak()
    yield peak
    if before is not None:
        peak.nbytes = max(0, _status_bytes("VmHWM") - before)


def _reset_resident_peak() -> int | None:
    """Start a new high-water mark; the resident bytes now. None where the system has no such mark (it is Linux's)."""
    try:
        # Without the trim the second training would find the first one's pages in malloc's hands and look smaller.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        return _status_bytes("VmRSS")
    except (OSError, AttributeError, TypeError, LookupError):
        return None


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(name)


@contextlib.contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """On CUDA let only deterministic kernels run, else two eager trainings would differ too; the CPU's already are."""
    if device.type != "cuda":
        yield
        return
    # cuBLAS reads this when its first handle is made, so it cannot wait for the flag below to ask for it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
            yield
    finally:
        torch.use_deterministic_algorithms(was[0], warn_only=was[1])
