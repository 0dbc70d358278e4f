"""What a program has needed in its last run is made and loaded beside the first step of the next one."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kitsune
from kitsune import background, coming, plan_files, running
from kitsune.backends import Backend, cache_folder
from kitsune.codegen import compiler as compilers
from kitsune.codegen.background import BackgroundCompiler
from kitsune.codegen.compiler import Compiler
from kitsune.codegen.machine_code import Binary, binary_path
from kitsune.config import config
from kitsune.ir import Graph, Op
from kitsune.last_run import MOST, LastRun
from kitsune.lazy import first_sight
from kitsune.planning import planner_for
from kitsune.running import PLAN_AFTER
from kitsune.runtime import ThreadPlans, plan_thread as module, thread_plans
from kitsune.runtime.plan_thread import PlanThread, key_of
from tests.codegen.test_compile_pool import program
from tests.plan.recorded import record
from tests.runtime.backends import chain, lazily, runner
from tests.runtime.checked import forget
from tests.runtime.repeated import counts
from tests.runtime.test_cold_start import Workers, cold, idle, step
from tests.runtime.test_plan_thread import in_time, plans

__all__ = ["plans"]
N_LAYERS = 5


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Iterator[Path]:
    with config.patch(cache_dir=str(tmp_path)):
        yield tmp_path


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
    """A run that begins with these, and the convolutions that the one before has needed."""
    run = LastRun(lambda files: None if brought is None else brought.extend(files))
    return run, run.begins(first)[0]


def test_what_a_run_has_needed_is_known_to_the_next_that_begins_alike() -> None:
    first, needed = named(network(3), "convolution"), named(network(3, True), "convolution", "convolution_backward")
    run, found = begun(first)
    assert run.is_known and not found
    run.needs_convolutions(needed[:4])
    run.needs_convolutions(needed)
    run.needs(["b.bin", "a.bin"], ["one.plan"])
    run.needs(["c.bin", "b.bin"], ["two.plan"])
    brought: list[str] = []
    run = LastRun(brought.extend)
    # Of today's graph the same operators are other objects, and those that were kept have no lines.
    found, plans = run.begins(named(network(3), "convolution"))
    assert keys(found) == keys(needed) and len(found) == 2 * N_LAYERS and all(op.site is None for op in found)
    (file,) = (cache_folder() / "plans").glob("*.run")
    assert brought == ["c.bin", "b.bin"] and plans == [file.with_name("two.plan")], "they take the place of those before"
    assert not begun(named(network(4), "convolution"))[1], "it begins with others"
    assert not begun(first[1:])[1]
    # What is known is not written again.
    file.unlink()
    run.needs_convolutions(needed)
    run.needs(["b.bin", "c.bin"], ["two.plan"])
    assert not file.exists()
    # Nor is it of another program, whose operators may be the same.
    run.begins(first[1:])
    run.needs_convolutions(needed[:1])
    (other,) = (cache_folder() / "plans").glob("*.run")
    assert other != file and keys(begun(first[1:])[1]) == keys(needed[:1])


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
    run.needs(["a.bin"], [])
    assert not found and (folder / "plans").read_text() == "no folder"
    (folder / "plans").unlink()
    with config.patch(warm_start=False):
        run, found = begun(first)
        run.needs_convolutions(first)
        run.needs(["a.bin"], [])
    assert not found and not run.is_known and not (folder / "plans").exists()
    run, _ = begun(first)
    run.needs([f"{k}.bin" for k in range(MOST + 1)], [])
    assert not (folder / "plans").exists(), "nobody has so many"


def test_convolutions_are_made_beside_the_first_step(plans: PlanThread, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    planned, held = network(3, True), threading.Event()
    needed = named(planned, "convolution", "convolution_backward")
    monkeypatch.setattr(thread_plans, "try_out", lambda op, values: made.append((key_of(op), threading.get_ident())))
    plans.learn(needed[-1], lambda: held.wait(20))  # type: ignore[arg-type, return-value]
    begins = ThreadPlans(hands_over=True)
    begins.foresee(needed[:-1])
    assert {*keys(needed)} == plans.known and len(plans._spare) == len(needed) - 1, "what the step itself needs comes first"
    held.set()
    in_time(lambda: len(made) == len(needed) - 1)
    assert [key for key, _ in made] == keys(needed[:-1]) and threading.get_ident() not in {ident for _, ident in made}
    # So nothing is left to be made before the plan is run, for which they are called there.
    assert begins.needed(planned) == [] and all(map(plans.knows, named(planned, "convolution")))


@pytest.mark.parametrize("why", ["it tries", "no graphs", "no room"])
def test_they_are_not_where(why: str, plans: PlanThread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ThreadPlans, "_has_room", lambda self, op: why != "no room")
    with torch.backends.cudnn.flags(benchmark=why == "it tries"):
        ThreadPlans(why != "no graphs").foresee(named(network(3), "convolution"))
        assert not plans.known


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


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of a few operators have plans on disk, and are known by their second one."""
    monkeypatch.setattr(plan_files, "WORTH", 1)
    monkeypatch.setattr(first_sight, "FIRST", 2)


@contextlib.contextmanager
def visit() -> Iterator[Workers]:
    """A process of its own, but for what is on disk."""
    with config.patch(verify=False, gate=False), cold(graphs=True) as (workers, _):
        workers.hold = False
        yield workers


def seen(n: int) -> list[list[int]]:
    """Kernels run, graphs captured and replays after each of so many steps."""
    found = []
    for _ in range(n):
        assert torch.equal(step(), chain()) and idle()
        found.append(counts("kernels", "captured", "replayed"))
    return found


@pytest.mark.usefixtures("short")
def test_the_second_run_has_its_plan_by_the_third_step(monkeypatch: pytest.MonkeyPatch) -> None:
    at: list[str] = []
    read = coming.read_ahead
    monkeypatch.setattr(coming, "read_ahead", lambda path: at.append(threading.current_thread().name) or read(path))
    with visit():
        cold_start = seen(7)
    with visit() as workers:
        warm_start = seen(5)
        assert not runner().coming.is_ahead
        assert workers.n_expected == 0 and not kitsune.explain().mended
    assert at == ["kitsune-background"], "there was none in the first run"
    assert cold_start.index(next(one for one in cold_start if one[0])) == PLAN_AFTER
    # By the second one, if it was read before the first had ended. It goes on as the first run did once it had kernels.
    assert [kernels for kernels, *_ in warm_start] in ([0, 0, 1, 2, 3], [0, 1, 2, 3, 4])
    assert [b - a for a, b in pairwise(n for *_, n in warm_start[2:])] == [1, 1]


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("why", ["it is off", "other knobs", "the plan is gone", "the plan is damaged", "it is shown"])
def test_it_has_it_as_late_as_the_first_where(why: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with visit():
        first = seen(7)
    (plan,) = (folder / "plans").glob("*.plan")
    if why == "the plan is gone":
        plan.unlink()
    elif why == "the plan is damaged":
        plan.write_bytes(b"other content")
    knobs: dict[str, Any] = {"it is off": {"warm_start": False}, "other knobs": {"fuel": 100}, "it is shown": {"debug": 2}}
    with config.patch(**knobs.get(why, {})), visit():
        assert seen(7) == first
        assert not kitsune.explain().mended
    # And what is found out then serves the next one.
    with visit():
        assert (seen(3)[-1][0] > 0) is (why != "other knobs")


@pytest.mark.usefixtures("short")
def test_lines_of_a_plan_that_was_read_ahead_are_those_of_today() -> None:
    for line in (10, 20):
        scope: dict[str, Any] = {"torch": torch}
        program = compile("\n" * (line - 1) + "x = (torch.arange(6.0).view(2, 3) * 2 + 1).abs()", "program.py", "exec")
        with visit():
            for _ in range(6 if line == 10 else 3):
                with lazily():
                    exec(program, scope)
                assert scope["x"].tolist() == [[1, 3, 5], [7, 9, 11]] and idle()
            (ready,) = [one for one in runner().ready.values() if one.plan is not None]
            assert {op.site.line for op in ready.plan.plan.graph.ops if op.site is not None} == {line}
            assert counts("kernels") != [0]


@pytest.mark.usefixtures("short")
def test_a_refusal_of_a_plan_that_was_read_ahead_names_the_line_of_today() -> None:
    for line in (10, 20):
        scope: dict[str, Any] = {"torch": torch}
        program = compile("\n" * (line - 1) + "x = ((torch.arange(6.0) * 2 + 1).abs() + 1).histc(4)", "program.py", "exec")
        with visit():
            for _ in range(6 if line == 10 else 3):
                with lazily():
                    exec(program, scope)
                assert scope["x"].tolist() == [2, 1, 1, 2] and idle()
            assert [ready.facts.refusal for ready in runner().ready.values() if ready.plan is not None] == [
                f"aten.histc.default at program.py:{line} looks at values on the host."
            ]


def another() -> torch.Tensor:
    x = torch.arange(24.0).view(4, 6)
    return ((x + 1) * 0.5 - x).abs() * 2


@pytest.mark.usefixtures("short")
def test_another_program_that_begins_alike_has_its_own_plan() -> None:
    with visit():
        seen(7)
    go = threading.Event()
    with visit():
        for k in range(PLAN_AFTER + 3):
            if k == PLAN_AFTER - 1:
                # It is still looking for what was made ahead when its own is to be made.
                background.thread.submit(lambda: go.wait(20) and None)
            with lazily():
                found = another()
            assert torch.equal(found, another()) and (k >= PLAN_AFTER - 1 or idle())
            if k == PLAN_AFTER - 1:
                go.set()
                assert idle()
        assert runner().coming.is_ahead and counts("kernels") != [0]


@pytest.mark.usefixtures("short")
def test_a_program_that_only_begins_like_another_looks_for_plans_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coming, "MOST_MISSED", 3)
    with visit():
        seen(7)
    with visit():
        for k in range(3):
            for size in (2, 3):
                with lazily():
                    found = (torch.arange(24.0).view(4, 6) + 1).repeat(size, 1)
                assert found.shape == (4 * size, 6) and idle()
            assert runner().coming.is_ahead is (k == 0)


def test_convolutions_that_a_plan_needs_are_kept_with_it(plans: PlanThread) -> None:
    first, planned = named(network(3), "convolution"), network(3, True)
    needed = named(planned, "convolution", "convolution_backward")
    for known in (False, True):
        plans.known.clear()
        nothing: Any = None
        one = coming.Coming(nothing, Backend("sm_90", nothing), torch.device("cpu"), ThreadPlans(hands_over=True))
        one.begins(first, planner_for("sm_90"))
        assert plans.known == ({*keys(needed)} if known else set())
        ready: Any = SimpleNamespace(graph=planned)
        assert keys(one.to_try(ready)) == ([] if known else keys(needed))


@pytest.mark.usefixtures("short")
def test_what_nobody_has_come_for_is_forgotten() -> None:
    with visit():
        seen(7)
    with visit():
        with lazily():
            another()
        assert idle() and runner().coming.is_ahead
        kitsune.reset()
        assert not runner().coming.is_ahead
        # It begins once more.
        assert seen(3)[-1][0] > 0


@contextlib.contextmanager
def busy() -> Iterator[None]:
    """The background thread begins with nothing new, and has done all at the end."""
    go, began = threading.Event(), threading.Event()
    background.thread.submit(lambda: (began.set(), go.wait(20))[0])
    try:
        assert began.wait(20)
        yield
    finally:
        go.set()
        assert idle()


def read_and_nothing_asked() -> None:
    """A first step, and what is read ahead for the program, but not before it is over."""
    with busy():
        assert torch.equal(step(), chain()) and not runner().coming.is_ahead
    assert runner().coming.is_ahead


@pytest.mark.usefixtures("short")
def test_what_is_read_for_a_program_that_is_over_is_dropped() -> None:
    with visit():
        seen(7)
    with visit():
        with busy():
            step()
            kitsune.reset()
        assert not runner().coming.is_ahead
        assert seen(3)[-1][0] > 0


@pytest.mark.usefixtures("short")
def test_what_a_program_that_is_over_has_needed_is_not_kept_for_the_next() -> None:
    with visit():
        seen(PLAN_AFTER)
        with busy():
            step()
            assert counts("kernels") == [1]
            kitsune.reset()
            with lazily():
                (torch.ones(4) * 3).abs()
            last_run = runner().coming._last_run
            assert last_run.is_known
        assert not last_run._path.exists()


@pytest.mark.usefixtures("short")
def test_a_file_with_the_plan_of_a_larger_graph_is_none(folder: Path) -> None:
    with visit():
        for program in (chain, another):
            for _ in range(PLAN_AFTER + 2):
                with lazily():
                    found = program()
                assert torch.equal(found, program()) and idle()
    of: Callable[[Path], Any] = plan_files.read_ahead
    small, large = sorted((folder / "plans").glob("*.plan"), key=lambda path: len(of(path)[0].graph.ops))
    small.write_bytes(large.read_bytes())
    with visit():
        assert seen(PLAN_AFTER + 1)[-1][0] > 0 and not kitsune.explain().mended


@pytest.mark.usefixtures("short")
def test_a_program_begins_once(folder: Path) -> None:
    with visit():
        seen(2)
        (pipeline,) = kitsune.session._thread.pipelines.values()
        # As a recorder does that knows too many ops, in the middle of a program.
        pipeline.recorder.forget()
        with lazily():
            (torch.ones(4) * 3).abs()
        seen(6)
    assert len([*(folder / "plans").glob("*.run")]) == 1
    with visit():
        assert seen(3)[-1][0] > 0


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("what", ["nobody has looked", "kernels are on their way", "it is waited for"])
def test_a_plan_that_was_read_ahead_is_not_read_once_more_when_it_would_be_made(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with visit():
        seen(7)
    monkeypatch.setattr(coming, "show_plan", lambda *given: pytest.fail("it was read ahead"))
    with visit() as workers:
        workers.hold = what == "kernels are on their way"
        read_and_nothing_asked()
        with busy() if what == "nobody has looked" else contextlib.nullcontext():
            for _ in range(PLAN_AFTER - 1 if what != "it is waited for" else 1):
                assert torch.equal(step(), chain()) and counts("kernels") == [0]
                assert what != "kernels are on their way" or idle()
        if what == "it is waited for":
            assert idle()
        workers.release()
        assert torch.equal(step(), chain()) and counts("kernels") == [1] and not kitsune.explain().mended


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    ("program", "n", "is_busy"), [(chain, 1, False), *[(another, n, False) for n in range(1, 5)], (another, 4, True)]
)
def test_an_interrupt_in_the_place_of_an_ask_loses_no_plan(
    program: Callable[[], torch.Tensor], n: int, is_busy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with visit():
        seen(7)
    later, calls = running.later, [0]

    def interrupted(make: Any) -> Any:
        calls[0] += 1
        if calls[0] == n:
            raise KeyboardInterrupt
        return later(make)

    def steps(n: int, waits: bool = True) -> None:
        for _ in range(n):
            with contextlib.suppress(KeyboardInterrupt), lazily():
                found = program()
            assert torch.equal(found, program()) and (not waits or idle())

    monkeypatch.setattr(running, "later", interrupted)
    with visit():
        read_and_nothing_asked()
        calls[0] = 0
        steps(2)
        # What was only hoped for is still on its way when the plan is asked for.
        with busy() if is_busy else contextlib.nullcontext():
            steps(2, not is_busy)
        steps(4)
        assert calls[0] >= n and counts("kernels")[0] > 0 and not kitsune.explain().mended


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
    # Nor where the program begins once more: what is loaded stays on the device.
    ahead.bring_soon([compiler.file_of(*wanted)], 0)
    assert len(loads) == 2


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
    monkeypatch.setattr(plan_files, "WORTH", 1)
    monkeypatch.setattr(LastRun, "begins", lambda *args: n_known.append(len((found := begins(*args))[1])) or found)
    monkeypatch.setattr(Compiler, "bring", lambda *args: n_brought.append(args) or bring(*args))
    for warm in (False, True, True):
        forget()
        module.plan_thread.known.clear()
        with (
            torch.backends.cudnn.flags(enabled=True, deterministic=True),
            config.patch(gate=False, verify=False, warm_start=warm, compile_workers=2, tuning="off"),
            kitsune.accelerate(device="cuda"),
        ):
            losses.append(steps(layers))
            assert kitsune.counters()["kernels"] and kitsune.counters()["replayed"]
            kitsune.wait_for_kernels(60)
    assert losses[1] == losses[0] and losses[2] == losses[0]
    assert n_known[:2] == [0, 0] and n_known[2] == 1 and n_brought
    forget()
