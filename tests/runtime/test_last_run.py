"""What a program has needed in its last run is made and loaded beside the first step of the next one."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kitsune
from kitsune.backends import cache_folder
from kitsune.codegen import compiler as compilers
from kitsune.codegen.background import BackgroundCompiler
from kitsune.codegen.compiler import Compiler
from kitsune.codegen.machine_code import Binary, binary_path
from kitsune.config import config
from kitsune.ir import Graph, Op
from kitsune.last_run import MOST, LastRun
from kitsune.runtime import ThreadPlans, calls, plan_thread as module, thread_plans
from kitsune.runtime.plan_thread import PlanThread, key_of
from kitsune.runtime.thread_plans import TELLING
from tests.codegen.test_compile_pool import program
from tests.plan.recorded import record
from tests.runtime.checked import forget
from tests.runtime.test_plan_thread import in_time

N_LAYERS = 5


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Iterator[Path]:
    with config.patch(cache_dir=str(tmp_path)):
        yield tmp_path


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> Iterator[PlanThread]:
    one = PlanThread()
    one.start()
    for user in (module, calls, thread_plans):
        monkeypatch.setattr(user, "plan_thread", one)
    yield one
    one.close()


def network(channels: int, channels_last: bool = False) -> Graph:
    """A step of convolutions of which each has more channels than the one before, in one of two layouts."""
    torch.manual_seed(0)
    layers = nn.Sequential(*[nn.Conv2d(channels + k, channels + k + 1, 3, padding=1) for k in range(N_LAYERS)])
    x = torch.randn(2, channels, 8, 8)
    if channels_last:
        x, layers = x.to(memory_format=torch.channels_last), layers.to(memory_format=torch.channels_last)
    return record(lambda: F.mse_loss(layers(x), torch.zeros(2, channels + N_LAYERS, 8, 8)).backward(), warmup=1)


def named(graph: Graph, *names: str) -> list[Op]:
    return [op for op in graph.ops if op.target._opname in names]


def keys(ops: Any) -> list[Any]:
    return list(map(key_of, ops))


def begun(first: list[Op], brought: list[str] | None = None) -> tuple[LastRun, list[Op]]:
    """A run that begins with these, and what the one before has needed."""
    run = LastRun(lambda files: None if brought is None else brought.extend(files))
    return run, run.begins(first[:TELLING])


def test_what_a_run_has_needed_is_known_to_the_next_that_begins_alike() -> None:
    graph = network(3)
    first, needed = named(graph, "convolution"), named(network(3, True), "convolution", "convolution_backward")
    run, found = begun(first)
    assert run.is_known and not found
    run.needs_convolutions(needed[:4])
    run.needs_convolutions(needed)
    run.needs_kernels(["b.bin", "a.bin"])
    run.needs_kernels(["c.bin", "b.bin"])
    brought: list[str] = []
    run, found = begun(named(network(3), "convolution"), brought)
    # Of today's graph the same operators are other objects, and those that were kept have no lines.
    assert keys(found) == keys(needed) and brought == ["c.bin", "b.bin"], "kernels take the place of those before"
    assert len(found) == 2 * N_LAYERS and all(op.site is None for op in found)
    assert not begun(named(network(4), "convolution"))[1], "it begins with others"
    assert not begun(first[1:])[1]
    # What is known is not written again.
    (file,) = (cache_folder() / "plans").glob("*.run")
    written = file.stat().st_mtime_ns, file.unlink()
    run.needs_convolutions(needed)
    run.needs_kernels(["b.bin", "c.bin"])
    assert written and not file.exists()


@pytest.mark.parametrize("damage", [b"", b"no seal", None], ids=["empty", "other content", "an operator that is gone"])
def test_a_file_that_cannot_be_read_is_none(damage: bytes | None, monkeypatch: pytest.MonkeyPatch) -> None:
    first = named(network(3), "convolution")
    run, _ = begun(first)
    run.needs_convolutions(first)
    (file,) = (cache_folder() / "plans").glob("*.run")
    if damage is None:
        monkeypatch.setattr("kitsune.last_run.load_graph", lambda text: Graph((), (), ()))
    else:
        file.write_bytes(damage)
    brought: list[str] = []
    run, found = begun(first, brought)
    assert not found and not brought and run.is_known
    monkeypatch.undo()
    with config.patch(cache_dir=str(file.parent.parent)):
        # It is written over.
        run.needs_convolutions(first)
        assert keys(begun(first)[1]) == keys(first)


def test_where_nothing_can_be_kept_or_nobody_wants_it_nothing_is_missed(folder: Path) -> None:
    first = named(network(3), "convolution")
    (folder / "plans").write_text("no folder")
    run, found = begun(first)
    run.needs_convolutions(first)
    run.needs_kernels(["a.bin"])
    assert not found and (folder / "plans").read_text() == "no folder"
    (folder / "plans").unlink()
    with config.patch(warm_start=False):
        run, found = begun(first)
        run.needs_convolutions(first)
        run.needs_kernels(["a.bin"])
    assert not found and not run.is_known and not (folder / "plans").exists()
    run, _ = begun(first)
    run.needs_kernels([f"{k}.bin" for k in range(MOST + 1)])
    assert not (folder / "plans").exists(), "nobody has so many"


def seen_by(thread_plans_: ThreadPlans, ops: list[Op]) -> ThreadPlans:
    for op in ops:
        thread_plans_.seen(op)
    return thread_plans_


def second_run(ops: list[Op]) -> ThreadPlans:
    return seen_by(ThreadPlans(True, LastRun(lambda files: None)), ops)


def test_convolutions_of_the_last_run_are_made_beside_the_first_step(plans: PlanThread, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    graph, planned = network(3), network(3, True)
    first = named(graph, "convolution")
    ThreadPlans.needed(second_run(first), planned)
    wanted = keys(named(planned, "convolution", "convolution_backward"))
    monkeypatch.setattr(thread_plans, "try_out", lambda op, values: made.append((key_of(op), threading.get_ident())))
    begins, held = second_run(first[: TELLING - 1]), threading.Event()
    assert not plans.known and not made, "so far it could be many"
    plans.learn(first[-1], lambda: held.wait(20))  # type: ignore[arg-type, return-value]
    seen_by(begins, first[TELLING - 1 :])
    assert {*wanted} <= plans.known and len(plans._spare) == len(wanted), "what the step itself needs comes first"
    held.set()
    in_time(lambda: len(made) == len(wanted))
    assert [key for key, _ in made] == wanted and threading.get_ident() not in {ident for _, ident in made}
    # So nothing is left to be made before the plan is run, for which they are called there.
    assert begins.needed(planned) == [] and all(map(plans.knows, named(planned, "convolution")))
    made.clear()
    assert not second_run(named(network(4), "convolution")).needed(graph) or made


@pytest.mark.parametrize("why", ["it tries", "it is off", "no graphs", "no room"])
def test_they_are_not_where(why: str, plans: PlanThread, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, planned = network(3), network(3, True)
    first = named(graph, "convolution")
    second_run(first).needed(planned)
    monkeypatch.setattr(ThreadPlans, "_has_room", lambda self, op: why != "no room")
    with config.patch(warm_start=why != "it is off"), torch.backends.cudnn.flags(benchmark=why == "it tries"):
        seen_by(ThreadPlans(why != "no graphs", LastRun(lambda files: None)), first)
        assert not plans.known
        monkeypatch.undo()


def test_all_else_comes_before_what_is_spare(plans: PlanThread) -> None:
    first, order, held = named(network(3), "convolution"), list[str](), threading.Event()
    plans.learn(first[0], lambda: (order.append("asked"), held.wait(20))[0])  # type: ignore[func-returns-value]
    in_time(lambda: order)
    for op in first[1:4]:
        plans.learn(op, lambda: order.append("spare"), is_spare=True)
    plans.learn(first[4], lambda: order.append("asked later"))
    assert all(map(plans.knows, first))
    held.set()
    in_time(lambda: len(order) == 5)
    assert order == ["asked", "asked later", "spare", "spare", "spare"]


@pytest.mark.parametrize("ends", ["the first step", "a capture of the program's"])
def test_spare_ones_are_dropped_when(ends: str, plans: PlanThread) -> None:
    first, made, held = named(network(3), "convolution"), list[Op](), threading.Event()
    plans.learn(first[0], lambda: held.wait(20))  # type: ignore[arg-type, return-value]
    for op in first[1:]:
        plans.learn(op, lambda op=op: made.append(op), is_spare=True)  # type: ignore[misc]
    if ends == "the first step":
        ThreadPlans().make(Graph((), (), ()))
        held.set()
    else:
        threading.Timer(0.05, held.set).start()
        plans.settle()
    assert plans.call(int, ("3",), {}, torch.device("cpu")) == 3
    assert not made and plans.known == {key_of(first[0])}


class Loaded:
    def __init__(self, binary: Any, device: int) -> None:
        if binary.code == b"of another device":
            raise RuntimeError("cuModuleLoadData: no kernel image is available for execution on the device")
        self.binary, self.device = binary, device


def test_a_kernel_that_was_brought_ahead_is_not_loaded_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[Any] = []
    monkeypatch.setattr(compilers, "LoadedKernel", lambda *args: loads.append(Loaded(*args)) or loads[-1])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    device, one = torch.device("cuda", 0), program()
    wanted = one, device, 16, False
    compiler = Compiler(folder)
    job = compiler.job_of(*wanted)
    assert compiler.file_of(*wanted) == binary_path(job).name
    code = Binary("kernel", "Pi", "", 4, 0, False, b"code")
    code.write(binary_path(job))
    (folder / "other.bin").write_bytes(b"damaged")
    ahead = BackgroundCompiler(compiler, lambda: object(), lambda work: work())  # type: ignore[arg-type, return-value]
    ahead.bring_soon([compiler.file_of(*wanted), "gone.bin", "other.bin"], 0)
    assert [(one.binary, one.device) for one in loads] == [(code, 0)]
    # For another device it is loaded by itself.
    elsewhere = ahead.ask(one, torch.device("cuda", 1), 16, False).result(20)
    assert [one.device for one in loads] == [0, 1] and elsewhere._loaded is loads[1]  # type: ignore[attr-defined]
    compiled = ahead.ask(*wanted).result(20)
    compiled.load()
    assert len(loads) == 2 and compiled._loaded is loads[0]  # type: ignore[attr-defined]


def steps(make: Callable[[], nn.Module]) -> list[float]:
    torch.manual_seed(0)
    model, x = make().cuda(), torch.randn(32, 64, 28, 28, device="cuda")
    optimizer, found = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True), []
    for _ in range(40):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(x).float().square().mean()
        loss.backward()
        found.append(loss.detach())
        optimizer.step()
        if len(found) == 20:
            kitsune.wait_for_kernels(60)
    return [loss.item() for loss in found]


def layers() -> nn.Module:
    sizes = [64, 96, 128, 160, 192]
    blocks = [layer for a, b in pairwise(sizes) for layer in (nn.Conv2d(a, b, 3), nn.BatchNorm2d(b), nn.ReLU())]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(sizes[-1], 10))


@pytest.mark.gpu
def test_a_second_run_has_the_same_losses_and_begins_with_what_the_first_has_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    losses, n_known, n_brought = [], [], []
    begins, bring = LastRun.begins, Compiler.bring
    monkeypatch.setattr(LastRun, "begins", lambda *args: n_known.append(len(found := begins(*args))) or found)
    monkeypatch.setattr(Compiler, "bring", lambda *args: n_brought.append(args) or bring(*args))
    for warm in (False, True, True):
        forget()
        module.plan_thread.known.clear()
        with (
            torch.backends.cudnn.flags(enabled=True, deterministic=True),
            config.patch(gate=False, warm_start=warm, compile_workers=2, tuning="off"),
            kitsune.accelerate(device="cuda"),
        ):
            losses.append(steps(layers))
            assert kitsune.counters()["kernels"] and kitsune.counters()["replayed"]
            kitsune.wait_for_kernels(60)
    assert losses[1] == losses[0] and losses[2] == losses[0]
    assert n_known[:2] == [0, 0] and n_known[2] > TELLING and n_brought
    forget()
