"""CUDA graphs on a GPU: training as in eager, and what a capture leaves behind when it breaks off."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kitsune
from kitsune.config import config
from kitsune.runtime.cuda_graph import CudaGraphs
from tests.runtime.backends import update
from tests.runtime.checked import forget
from tests.runtime.repeated import counts

pytestmark = pytest.mark.gpu
FUSE = pytest.mark.parametrize("fuse", [True, False], ids=["fused", "op by op"])


@pytest.fixture(autouse=True)
def repeatable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    forget()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    forget()
    torch.use_deterministic_algorithms(False)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.GELU(), nn.Dropout(0.2), nn.Linear(128, 10))


def convolutions() -> nn.Module:
    first = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1))
    return nn.Sequential(nn.Unflatten(1, (1, 8)), first, nn.Flatten(), nn.Linear(288, 10))


def transformer() -> nn.Module:
    return nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True), nn.Flatten(), nn.Linear(64, 10))


def train(context: Any, make: Any = mlp, steps: int = 20, optimizer: Any = torch.optim.AdamW, **how: Any) -> list[torch.Tensor]:
    """Everything that training leaves, the generator's state included."""
    torch.manual_seed(0)
    model = make().cuda()
    optimizer = optimizer(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.7)
    numbers, kept = torch.Generator().manual_seed(1), []
    with context:
        for step in range(steps):
            x = torch.randn(32, 8, 8, generator=numbers).cuda()
            target = torch.randint(0, 10, (32,), generator=numbers).cuda()
            if how.get("fresh"):
                kept.append(x)
            if step == how.get("seed"):
                torch.manual_seed(7)
            if step == how.get("replace"):
                for p in model.parameters():
                    p.data = p.data.clone()
            if step == how.get("load"):
                optimizer.load_state_dict(optimizer.state_dict())
                model.load_state_dict(model.state_dict(), assign=True)
                optimizer.param_groups[0]["params"] = list(model.parameters())
            loss = F.cross_entropy(model(x), target)
            update(loss, optimizer, schedule, step, how)
            if step == how.get("fail"):
                with contextlib.suppress(RuntimeError):
                    model(x[:, :3])
            if how.get("item"):
                loss.item()
            kept.append(loss if how.get("hold") else loss.detach())
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    state = [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, torch.Tensor)]
    return [*(k.detach() for k in kept), *model.parameters(), *model.buffers(), *grads, *state, torch.cuda.get_rng_state()]


HOWS: dict[str, dict[str, Any]] = {
    "plain": {},
    "convolutions": {"make": convolutions},
    "transformer": {"make": transformer},
    "momentum": {"optimizer": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9)},
    "every loss read": {"item": True},
    "losses held": {"hold": True},
    "each batch elsewhere": {"fresh": True},
    "gradients kept": {"zero": False},
    "accumulation": {"every": 3, "steps": 30},
    "reseeded": {"seed": 9},
    "parameters elsewhere": {"replace": 9},
    "state loaded": {"load": 9},
    "an error in between": {"fail": 9},
}


@FUSE
@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
def test_training_is_as_in_eager(how: dict[str, Any], fuse: bool) -> None:
    expected = train(contextlib.nullcontext(), **how)
    with config.patch(fuse=fuse):
        got = train(kitsune.accelerate(), **how)
    assert len(got) == len(expected) and all(map(torch.equal, got, expected)), kitsune.counters()
    replayed, refused = counts("replayed", "graph_refused")
    assert replayed > 5 and not refused and not kitsune.explain().mended, kitsune.counters()


@FUSE
def test_a_stream_of_the_programs_own(fuse: bool) -> None:
    expected = train(contextlib.nullcontext())
    with config.patch(fuse=fuse), torch.cuda.stream(torch.cuda.Stream()):
        got = train(kitsune.accelerate())
    assert all(map(torch.equal, got, expected)) and counts("replayed")[0] > 5


def test_streams_that_take_turns() -> None:
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    x = torch.ones(1 << 20, device="cuda")
    # Neither of these streams waits for the one that x is made on.
    torch.cuda.synchronize()
    with kitsune.accelerate():
        for k in range(12):
            streams[k % 2].wait_stream(streams[1 - k % 2])
            with torch.cuda.stream(streams[k % 2]):
                x.add_(1)
                y = (x * 2).sin().exp()
                kitsune.flush()
                assert torch.equal(y, torch.full_like(y, 2.0 * (k + 2)).sin().exp())
    assert counts("replayed")[0] > 4


def breaks_off(monkeypatch: pytest.MonkeyPatch, fail: Any) -> None:
    record = CudaGraphs.record

    def broken(self: CudaGraphs, work: Any, inputs: Any) -> Any:
        def both(given: Any) -> Any:
            outputs = work(given)
            fail()
            return outputs

        return record(self, both, inputs)

    monkeypatch.setattr(CudaGraphs, "record", broken)


def no_memory() -> None:
    torch.empty(1 << 50, device="cuda")


def synchronize() -> None:
    torch.ones(1, device="cuda").sum().item()


@pytest.mark.parametrize("fail", [no_memory, synchronize])
def test_a_capture_that_breaks_off_is_said_and_changes_nothing(fail: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = train(contextlib.nullcontext())
    with monkeypatch.context() as patch:
        breaks_off(patch, fail)
        got = train(kitsune.accelerate())
    assert all(map(torch.equal, got, expected)) and counts("replayed") == [0]
    assert "The capture failed" in kitsune.explain().mended[0]
    forget()
    assert all(map(torch.equal, train(kitsune.accelerate()), expected)) and counts("replayed")[0] > 5


def memory_of_this_process() -> int | None:
    """Bytes of the device that this process holds, the driver's own for it included; None where others cannot be told apart."""
    with contextlib.suppress(Exception):
        import pynvml

        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
        running = pynvml.nvmlDeviceGetComputeRunningProcesses(pynvml.nvmlDeviceGetHandleByUUID(uuid))
        # In a container with process numbers of its own this process is not found.
        if found := [process.usedGpuMemory for process in running if process.pid == os.getpid()]:
            return int(found[0])
    free, total = torch.cuda.mem_get_info()
    return None if "PYTEST_XDIST_WORKER" in os.environ else total - free


@pytest.mark.parametrize("sends", [False, True])
def test_a_thousand_captures_leave_nothing_behind(sends: bool) -> None:
    def work(inputs: Any, send: Any) -> list[torch.Tensor]:
        y = F.dropout(inputs[0] @ inputs[0], 0.5)
        if sends:
            send([y[0, 0]])
        return [F.dropout(y @ y, 0.5)]

    recorder, x = CudaGraphs(torch.device("cuda", torch.cuda.current_device())), torch.ones(512, 512, device="cuda")
    # cuBLAS begins with the first product, and not in a capture.
    work([x], lambda tensors: None)
    for k in range(1010):
        graph = recorder.record(work, [x], int(sends))
        graph.replay()
        graph.destroy()
        if k == 9:
            torch.cuda.synchronize()
            before = torch.cuda.memory_reserved(), memory_of_this_process(), resident()
    torch.cuda.synchronize()
    after = torch.cuda.memory_reserved(), memory_of_this_process(), resident()
    # Torch's allocator, the device with what the driver keeps for graphs, and the host.
    growth = [b - a for a, b in zip(before, after, strict=True) if a is not None and b is not None]
    assert len(growth) >= 2 and max(growth) < 64 << 20, growth


def resident() -> int:
    """Bytes of host memory that this process uses."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_inside_a_capture_of_the_program_nothing_is_replayed() -> None:
    x = torch.ones(1024, device="cuda")
    with kitsune.accelerate():
        for _ in range(6):
            y = (x * 2 + 1).relu()
            kitsune.flush()
        replayed = counts("replayed")[0]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            z = (x * 2 + 1).relu()
            kitsune.flush()
        assert counts("replayed") == [replayed]
        x.add_(1)
        kitsune.flush()
        graph.replay()
        assert torch.equal(z, torch.full_like(z, 5.0)) and torch.equal(y, torch.full_like(y, 3.0))


@pytest.mark.parametrize("fuse", [True, False])
def test_peak_memory_is_at_most_that_of_a_graph_of_eager(fuse: bool) -> None:
    def step(model: nn.Module, x: torch.Tensor) -> None:
        model(x).square().mean().backward()
        for p in model.parameters():
            p.grad = None

    def model() -> nn.Module:
        return nn.Sequential(*[layer for _ in range(6) for layer in (nn.Linear(1024, 1024), nn.GELU(), nn.Dropout(0.1))]).cuda()

    def peak(run: Any) -> int:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    x = torch.randn(8192, 1024, device="cuda")
    eager, ours = model(), model()

    def by_hand() -> None:
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                step(eager, x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step(eager, x)
        graph.replay()

    def under_kitsune() -> None:
        with kitsune.accelerate():
            for _ in range(8):
                step(ours, x)
                kitsune.flush()

    expected = peak(by_hand)
    with config.patch(fuse=fuse):
        assert peak(under_kitsune) <= 1.05 * expected
    assert counts("replayed")[0] > 2
