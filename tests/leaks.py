"""Tests on a GPU leave no memory behind: not in torch's allocator, nor in what that keeps of the driver's."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import kitsune
from kitsune import background
from kitsune.runtime import cuda_graph
from kitsune.runtime.plan_thread import plan_thread

PASSED = pytest.StashKey[bool]()
# What the tests themselves keep of one test for the next.
CACHES = (("tests.parity.test_op_db", "eager"), ("tests.parity.outcomes", "_random"), ("tests._opinfo", "sample"))
# A capture that breaks off stays, with its state of the generator: two numbers, perhaps in a segment of their own.
BROKEN_OFF = {"allocated": 1 << 10, "reserved": 2 << 20}
SECONDS = 20.0
_is_settled = False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Iterator[Any]:
    report = yield
    if call.when == "call":
        item.stash[PASSED] = report.passed
    return report


@pytest.fixture(autouse=True)
def leaves_no_memory_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """No more bytes are allocated, and none more reserved, on the current device than before, once Kitsune has forgotten all."""
    if "gpu" not in request.keywords or not torch.cuda.is_available():
        yield
        return
    before, n_before = held(), len(cuda_graph._broken_off)
    yield
    # Of others pytest keeps the frames, to tell of them.
    if request.node.stash.get(PASSED, False):
        request.node.funcargs.clear()
        now, n_broken_off = held(), len(cuda_graph._broken_off) - n_before
        more = {name: n_bytes - before[name] for name, n_bytes in now.items()}
        assert all(n_bytes <= n_broken_off * BROKEN_OFF[name] for name, n_bytes in more.items()), more


def held() -> dict[str, int]:
    for module, name in CACHES:
        if module in sys.modules:
            getattr(sys.modules[module], name).cache_clear()
    kitsune.reset()
    # What is being made there holds the step that it is made for.
    background.wait(SECONDS)
    plan_thread.settle()
    gc.collect()
    _settle()
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    return {"allocated": torch.cuda.memory_allocated(), "reserved": torch.cuda.memory_reserved()}


def _settle() -> None:
    """Once in a process: what torch allocates for good, which is where graphs find the state of the generator; and the objects of
    modules are left alone, so many that each collection would take 0.1 s."""
    global _is_settled
    if not _is_settled:
        _is_settled = True
        gc.freeze()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            torch.rand(1, device="cuda")
