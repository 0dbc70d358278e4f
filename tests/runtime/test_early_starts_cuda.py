"""Kernels whose blocks come to the device while the launch before them ends."""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import kitsune
from kitsune.codegen import COPY_RESULT, Compiler
from kitsune.config import config
from tests.runtime.checked import forget
from tests.runtime.repeated import counts
from tests.runtime.test_capture_cuda import convolutions, mlp, train, transformer

pytestmark = pytest.mark.gpu
PROGRAMMATIC = 1


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path) -> Iterator[None]:
    """Nothing is known and nothing is cached."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    forget()
    with config.patch(cache_dir=str(tmp_path / "kernels"), compile_workers=0, gate=False), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    forget()
    torch.use_deterministic_algorithms(False)


def edges(graph: torch.cuda.CUDAGraph) -> list[int]:
    """The kinds of a graph's edges, as the driver says them."""
    driver, n = ctypes.CDLL("libcuda.so.1"), ctypes.c_size_t()
    raw = ctypes.c_void_p(graph.raw_cuda_graph())
    assert driver.cuGraphGetEdges_v2(raw, None, None, None, ctypes.byref(n)) == 0
    nodes, data = (ctypes.c_void_p * n.value), (ctypes.c_uint8 * 8 * n.value)()
    assert driver.cuGraphGetEdges_v2(raw, nodes(), nodes(), data, ctypes.byref(n)) == 0
    return [one[2] for one in data]


def copies(early: bool, tmp_path: Path, between: bool = False) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """A graph of four copies, each of what the one before has written, with an addition of torch's in the middle; its tensors."""
    device = torch.device("cuda")
    kernel = Compiler(tmp_path, early=lambda: early).compile(COPY_RESULT, device, 1, False)
    kernel.load()
    values = [torch.full((4,), float(i), device=device) for i in range(5)]
    places = [torch.tensor([value.data_ptr()], device=device) for value in values]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        for i in range(4):
            if between and i == 2:
                values[2] += 1
            stream = torch.cuda.current_stream().cuda_stream
            kernel.launch(1, [places[i + 1].data_ptr(), values[i].data_ptr(), 16], stream)
    return graph, [*values, *places]


@pytest.mark.parametrize("early", [True, False])
def test_a_captured_kernel_is_put_on_the_device_while_the_one_before_it_ends(early: bool, tmp_path: Path) -> None:
    allowed = torch.cuda.get_device_capability() >= (9, 0)
    graph, values = copies(early, tmp_path)
    assert edges(graph) == [PROGRAMMATIC if early and allowed else 0] * 3
    for number in range(50):
        values[0].fill_(number)
        graph.replay()
        assert values[4].tolist() == [number] * 4


def test_so_is_one_behind_a_kernel_of_torchs_and_none_of_torchs(tmp_path: Path) -> None:
    allowed = torch.cuda.get_device_capability() >= (9, 0)
    graph, values = copies(True, tmp_path, between=True)
    assert sorted(edges(graph)) == sorted([0] + [PROGRAMMATIC * allowed] * 3)
    graph.replay()
    assert values[4].tolist() == [1.0] * 4


@pytest.mark.parametrize("make", [mlp, convolutions, transformer])
def test_the_results_are_those_of_kernels_that_wait_for_it(make: object) -> None:
    results = []
    for early in (False, True):
        forget()
        with config.patch(early_starts=early):
            results.append(train(kitsune.accelerate(), make, steps=12))  # type: ignore[arg-type]
        assert counts("replayed")[0] >= 6 and counts("kernels")[0] > 0, kitsune.counters()
    assert all(map(torch.equal, *results))
