"""Tests on a GPU leave no memory behind: neither in torch's allocator nor, once what it keeps free is given back, in the driver."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator

import pytest
import torch

import kitsune

# Until then objects are of modules, of which there are so many that each collection would take 0.1 s.
_frozen = False
# What the tests themselves keep of one test for the next.
CACHES = (("tests.parity.test_op_db", "eager"), ("tests.parity.outcomes", "_random"), ("tests._opinfo", "sample"))


@pytest.fixture(autouse=True)
def leaves_no_memory_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Bytes that are allocated, and reserved, on the current device are as many as before, once Kitsune has forgotten all."""
    if "gpu" not in request.keywords or not torch.cuda.is_available():
        yield
        return
    failed = request.session.testsfailed
    before = held()
    yield
    # What has failed is kept, with its frames, to be told of.
    if request.session.testsfailed == failed and (now := held()) != before:
        left = [f"{name} {b - a:+d} bytes" for name, a, b in zip(("allocated", "reserved"), before, now, strict=True)]
        pytest.fail(f"memory is left: {', '.join(left)}")


def held() -> tuple[int, int]:
    global _frozen
    for module, name in CACHES:
        if module in sys.modules:
            getattr(sys.modules[module], name).cache_clear()
    kitsune.reset()
    gc.collect()
    if not _frozen:
        _frozen = True
        gc.freeze()
        _settle()
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()


def _settle() -> None:
    """What torch allocates once in a process: where graphs find the state of the generator."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.rand(1, device="cuda")
